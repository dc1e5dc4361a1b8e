"""Use finished models: chat, generate, evaluate."""
