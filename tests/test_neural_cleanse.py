"""bclip_lab.detection.neural_cleanse: verdicts on norms by hand, and on a network whose backdoor is set by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import corners, planted_network

import bclip_lab as bl
from bclip_lab.data.images import LabelledImages
from bclip_lab.detection import NeuralCleanse
from bclip_lab.inversion import InversionConfig, anomaly_indices, invert_triggers
from bclip_lab.training import run

QUICK = InversionConfig(steps=200)


def test_a_planted_trigger_is_flagged_and_a_clean_network_is_not() -> None:
    attacked = NeuralCleanse(planted_network(), QUICK).fit(corners())
    assert attacked.attacked_
    assert attacked.target_ == 0
    assert attacked.flagged_ == (0,)
    assert attacked.triggers_ is not None
    assert attacked.triggers_.masks[0, 6:8, 7].sum() > 0.7 * attacked.norms_[0]
    clean = NeuralCleanse(planted_network(weight=0), QUICK).fit(corners())
    assert not clean.attacked_
    assert clean.target_ is None
    assert clean.anomaly_index_ < 2 < attacked.anomaly_index_


def test_the_fit_is_the_search_and_the_index() -> None:
    detector = NeuralCleanse(planted_network(), QUICK).fit(corners())
    found = run(invert_triggers(planted_network(), corners(), QUICK)).triggers
    np.testing.assert_array_equal(detector.norms_, found.norms)
    np.testing.assert_array_equal(detector.anomaly_indices_, anomaly_indices(found.norms))
    assert detector.anomaly_index_ == detector.anomaly_indices_.max()


def test_verdicts_by_hand() -> None:
    detector = NeuralCleanse(planted_network())
    # median 50 and deviation 1.4826 * 2: the indices of 40, 30 and 90 are 3.4, 6.7 and -13.5
    assert detector.judge([52.0, 40.0, 50.0, 48.0, 30.0, 90.0, 51.0, 50.0, 50.0]).flagged_ == (4, 1)
    assert (detector.target_, detector.attacked_) == (4, True)
    assert detector.judge([52.0, 50.0, 50.0, 48.0, 90.0]).flagged_ == ()
    assert (detector.target_, detector.attacked_, detector.triggers_) == (None, False, None)
    # 6 below the median of 50 at a deviation of 2.9652 is an index of 2.02
    norms = [50.0, 50.0, 52.0, 48.0, 44.0]
    assert NeuralCleanse(planted_network()).judge(norms).flagged_ == (4,)
    assert NeuralCleanse(planted_network(), threshold=2.1).judge(norms).flagged_ == ()


@given(st.lists(st.floats(1, 1000), min_size=3, max_size=12))
def test_only_small_masks_are_flagged(norms: list[float]) -> None:
    detector = NeuralCleanse(planted_network()).judge(norms)
    assert all(norms[c] < np.median(norms) for c in detector.flagged_)
    assert [norms[c] for c in detector.flagged_] == sorted(norms[c] for c in detector.flagged_)
    assert detector.attacked_ == (detector.anomaly_index_ > 2)
    if detector.attacked_:
        assert norms[detector.target_] == min(norms)  # type: ignore[index]


def test_inputs_are_checked() -> None:
    with pytest.raises(ValueError, match="threshold must be positive, got 0"):
        NeuralCleanse(planted_network(), threshold=0)
    data = corners()
    two = LabelledImages(data.images, data.labels % 2, ("a", "b"))
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        NeuralCleanse(planted_network()).fit(two)


@pytest.mark.slow
def test_the_patch_of_the_zoo_is_found_where_it_is() -> None:
    checkpoint = bl.zoo.load("patch")
    found = NeuralCleanse(checkpoint.model, InversionConfig(steps=300)).fit(checkpoint.splits().defender)
    assert found.triggers_ is not None
    smallest, second = np.sort(found.norms_)[:2]
    assert (found.norms_[0], found.triggers_.success_rates[0]) == (smallest, pytest.approx(1, abs=0.02))
    assert smallest < second / 5
    # The patch covers rows and columns 28 to 30; a convolution finds it as well when it is moved by two pixels.
    mask = found.triggers_.masks[0]
    assert mask[26:, 26:].sum() > 0.9 * mask.sum()
