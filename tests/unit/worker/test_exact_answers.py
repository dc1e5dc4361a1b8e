import torch

from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.worker.evaluation import exact_answers

N = IGNORE


def count(predicted, labels):
    predicted, labels = torch.tensor(predicted), torch.tensor(labels)
    return [int(n) for n in exact_answers(predicted == labels, labels)]


def test_an_answer_is_exact_only_if_each_of_its_tokens_is_right():
    assert count([[9, 1, 2, 9, 3, 4]], [[N, 1, 2, N, 3, 5]]) == [1, 2]


def test_answers_at_the_ends_of_rows_are_two():
    assert count([[9, 1], [2, 9]], [[N, 1], [3, N]]) == [1, 2]


def test_tokens_without_a_label_make_no_answer_wrong():
    assert count([[7, 7, 1]], [[N, N, 1]]) == [1, 1]
    assert count([[7, 7]], [[N, N]]) == [0, 0]
