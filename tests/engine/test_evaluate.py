"""Nearest neighbours, linear probe and feature collection."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from vitrail.engine.data import DataConfig, open_source
from vitrail.engine.evaluate.features import Features, evaluation_mode, evaluation_view, extract
from vitrail.engine.evaluate.knn import knn_accuracy, knn_predict
from vitrail.engine.evaluate.linear import linear_accuracy


def clusters(count: int, seed: int, spread: float) -> Features:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 5, (count,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(count, 16, generator=generator), labels)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_knn_equals_scikit_learn(chunk):
    bank, queries = clusters(300, 1, 1.5), clusters(100, 2, 1.5)
    unit = torch.nn.functional.normalize
    theirs = KNeighborsClassifier(
        n_neighbors=20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(unit(bank.vectors.double()), bank.labels)
    ours = knn_predict(queries.vectors.double(), Features(bank.vectors.double(), bank.labels), chunk=chunk)
    assert ours.tolist() == theirs.predict(unit(queries.vectors.double())).tolist()


def test_knn_with_a_bank_smaller_than_the_vote():
    bank = clusters(8, 1, 0.1)
    assert knn_accuracy(bank, bank, neighbours=20) > 0.6


def test_knn_is_chance_without_structure():
    noise = Features(torch.randn(500, 16), torch.randint(0, 5, (500,)))
    other = Features(torch.randn(500, 16), torch.randint(0, 5, (500,)))
    assert knn_accuracy(noise, other) < 0.35


def test_linear_probe_separates_what_is_linear():
    train, test = clusters(400, 1, 0.5), clusters(200, 2, 0.5)
    assert linear_accuracy(train, test) > 0.97
    assert linear_accuracy(train, test, standardise=True) > 0.97
    faint = [Features(f.vectors * 1e-4, f.labels) for f in (train, test)]
    assert linear_accuracy(*faint) < linear_accuracy(*faint, standardise=True) - 0.1
    shuffled = Features(train.vectors, train.labels[torch.randperm(400)])
    assert linear_accuracy(shuffled, test) < 0.5


def test_evaluation_view_is_the_usual_one():
    assert evaluation_view((224, 224)).ops[0].size == 256
    assert evaluation_view((32, 32)).ops[0].size == 32
    assert evaluation_view((32, 48)).size == (32, 48)


def test_features_are_in_the_order_of_the_split_and_complete():
    data = DataConfig(source="demo", threads=1)
    source = open_source(data, "val")
    view = evaluation_view((32, 32))
    found = extract(lambda x: x.flatten(1) / 255, source, view, data, batch=30, device=torch.device("cpu"), limit=100)
    assert found.vectors.shape == (100, 32 * 32 * 3)
    whole = extract(lambda x: x[:, 0, 0] / 1, source, view, data, batch=512, device=torch.device("cpu"))
    assert whole.labels.tolist() == [source.label(i) for i in range(len(source))]


def test_evaluation_mode_restores_training_even_after_an_error():
    module = nn.BatchNorm1d(4).train()

    def fail() -> None:
        with evaluation_mode(module):
            assert not module.training
            assert not torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert module.training
    assert torch.is_grad_enabled()
