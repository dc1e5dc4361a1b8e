"""What torch.compile has to take as it is."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3] / "raytrain_adv"


def test_no_function_of_ops_imports_transformers_by_a_dotted_name():
    """`import transformers.x` in a traced function breaks graphs of PyTorch 2.11: its package is
    no plain module.
    """
    found = []
    for path in sorted((ROOT / "ops").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                imports = [node for node in ast.walk(function) if isinstance(node, ast.Import)]
                names = [alias.name for node in imports for alias in node.names]
                found += [(path.name, n) for n in names if n.startswith("transformers")]
    assert not found
