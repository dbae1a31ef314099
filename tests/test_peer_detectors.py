"""bclip_lab.detection: STRIP, SCALE-UP, IBD-PSC, TeCo and its corruptions, on networks set by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.detection import CORRUPTIONS, IBDPSC, STRIP, ScaleUp, TeCo, corrupt
from bclip_lab.detection.thresholds import ImageDetector, empirical_threshold
from bclip_lab.evaluation import RocCurve

CLASSES = ("cat", "dog", "owl")


def labelled(images: Tensor, labels: Tensor | None = None) -> LabelledImages:
    return LabelledImages(images, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels, CLASSES)


def pixels(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None]


def linear(weight: list[list[float]], bias: list[float] | None = None) -> nn.Sequential:
    """Pixels to logits, by hand."""
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias or [0.0] * len(weight)))
    return nn.Sequential(nn.Flatten(), layer)


def close(scores: Tensor, expected: list[float]) -> None:
    assert scores.dtype == torch.float32 and scores.device.type == "cpu"
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=0)


# --- STRIP ---

# Two pixels x are two logits x ln 3: (1, 0) has p = (3/4, 1/4) and an entropy of 2 - 3/4 log2 3 bits.
TO_LN_3 = [[math.log(3), 0.0], [0.0, math.log(3)]]
SURE = 2 - 0.75 * math.log2(3)


def test_strip_entropies_by_hand() -> None:
    detector = STRIP(linear(TO_LN_3), overlays=2).fit(labelled(torch.zeros(4, 2, 1, 1)))
    images = pixels((1, 0), (0, 0))
    close(detector.score(images), [-SURE, -1])
    assert detector.scores_.tolist() == [-1, -1]
    detector.overlays_ = pixels((0, 0), (0, 1))
    # (1, 0) + (0, 1) is undecided; (0, 0) + (0, 1) is as sure of class 1 as (1, 0) is of class 0
    close(detector.score(images), [-(SURE + 1) / 2, -(1 + SURE) / 2])
    detector.overlays_ = pixels((1, 0), (1, 0))
    close(detector.score(images), [-SURE, -SURE])  # (2, 0) is clipped to (1, 0)


def test_strip_weighs_both_images() -> None:
    detector = STRIP(linear([[2 * math.log(3), 0.0], [0.0, 0.0]]), overlays=1, weight=0.5)
    detector.fit(labelled(torch.zeros(3, 2, 1, 1)))
    detector.overlays_ = pixels((0, 0))
    close(detector.score(pixels((1, 0))), [-SURE])
    detector.overlays_ = pixels((1, 1))
    close(detector.score(pixels((0, 0))), [-SURE])


def test_strip_lays_over_some_clean_images_and_calibrates_on_the_others() -> None:
    clean = labelled(torch.rand((12, 2, 1, 1), generator=torch.Generator().manual_seed(0)))
    detector = STRIP(linear(TO_LN_3), overlays=5).fit(clean)
    drawn = [image.tolist() for image in detector.overlays_]
    others = [row for row, image in enumerate(clean.images) if image.tolist() not in drawn]
    assert len(drawn) == 5 and len(others) == 7
    expected = detector.score(clean.subset(others)).double().sort().values
    torch.testing.assert_close(torch.from_numpy(np.sort(detector.scores_)), expected)
    again, other = (STRIP(linear(TO_LN_3), overlays=5, seed=seed).fit(clean) for seed in (0, 1))
    assert torch.equal(again.overlays_, detector.overlays_)
    assert not torch.equal(other.overlays_, detector.overlays_)


# --- SCALE-UP ---

# One pixel: class 1 from 0.36 on; class 2 would take over beyond 1.5, where no image is.
STEPS = linear([[0.0], [1.0], [2.0]], [0.36, 0.0, -1.5])


def test_scale_up_shares_by_hand() -> None:
    images = pixels((0.0,), (0.1,), (0.05,), (0.03,), (0.5,))
    detector = ScaleUp(STEPS).fit(labelled(images))
    # 0.1 times 3 stays class 0; 0.05 times 3, 5, 7; 0.03 times all; 0.5 is class 1, and stays so where it is clipped
    close(detector.score(images), [1.0, 0.2, 0.6, 1.0, 1.0])
    assert ScaleUp(STEPS, scales=(3, 4)).fit(labelled(images)).score(images).tolist() == [1.0, 0.5, 1.0, 1.0, 1.0]


def test_scale_up_per_class_by_hand() -> None:
    # class 0 has SPC 1, 0.2, 0.6: mean 0.6, deviation 0.4; the only image of class 1 takes those of all four
    images = pixels((0.0,), (0.1,), (0.05,), (0.5,))
    detector = ScaleUp(STEPS, per_class=True).fit(labelled(images))
    mean, deviation = 0.7, math.sqrt((0.3**2 + 0.5**2 + 0.1**2 + 0.3**2) / 3)
    close(detector.score(images), [1.0, -1.0, 0.0, 0.3 / deviation])
    torch.testing.assert_close(detector.means_, torch.tensor([0.6, mean, mean]).double(), atol=1e-7, rtol=0)
    # without any spread the deviation is one step of the score
    flat = ScaleUp(STEPS, per_class=True).fit(labelled(pixels((0.0,), (0.03,))))
    close(flat.score(images), [0.0, -4.0, -2.0, 0.0])


# --- IBD-PSC ---


def two_batch_norms() -> nn.Sequential:
    """Logits x + (0, 0.3, -9); with the last batch norm doubled twice that, with both 4 x + (0, 0.6, -18)."""
    first, last = nn.BatchNorm1d(3, eps=0), nn.BatchNorm1d(3, eps=0)
    with torch.no_grad():
        last.bias.copy_(torch.tensor([0.0, 0.3, -9.0]))
    return nn.Sequential(nn.Flatten(), first, last).eval()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# of class 1 where the first pixel is below 0.3; with both batch norms doubled, below 0.15
PAIRS = pixels((0.2, 0, 0), (0.25, 0, 0), (0.1, 0, 0), (0.5, 0, 0))
DECISIONS = torch.tensor([1, 1, 1, 0])


def test_ibd_psc_by_hand() -> None:
    detector = IBDPSC(two_batch_norms(), factor=2, error=0.4).fit(labelled(PAIRS, DECISIONS))
    assert detector.errors_ == [0.0, 0.5] and detector.amplified_ == (2,)
    close(detector.score(PAIRS), [sigmoid(-0.2), sigmoid(-0.4), sigmoid(0.2), sigmoid(1.4)])


def test_ibd_psc_averages_over_the_networks() -> None:
    # three of four labels are wrong, so already the first network exceeds the error
    wrong = labelled(PAIRS, torch.tensor([0, 0, 0, 0]))
    detector = IBDPSC(two_batch_norms(), factor=2).fit(wrong)
    assert detector.errors_ == [0.75] and detector.amplified_ == (1, 2)
    expected = [(0.2, -0.2), (0.1, -0.4), (0.4, 0.2), (0.4, 1.4)]
    close(detector.score(PAIRS), [(sigmoid(one) + sigmoid(two)) / 2 for one, two in expected])
    single = IBDPSC(two_batch_norms(), factor=2, networks=1).fit(wrong)
    assert single.amplified_ == (1,)
    close(single.score(PAIRS), [sigmoid(one) for one, _ in expected])


def test_ibd_psc_amplifies_all_where_the_error_is_not_exceeded() -> None:
    # the error of the first network, 0.5, does not exceed 0.5; the second decides as these labels have it
    detector = IBDPSC(two_batch_norms(), factor=2, error=0.5).fit(labelled(PAIRS, torch.tensor([0, 0, 1, 0])))
    assert detector.errors_ == [0.5, 0.0] and detector.amplified_ == (2,)


def test_ibd_psc_needs_batch_norms_with_parameters() -> None:
    for model in (linear(TO_LN_3), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3, affine=False))):
        with pytest.raises(ValueError, match="model must have batch norms with weight and bias, Sequential has none"):
            IBDPSC(model)


# --- TeCo ---


def test_teco_flips_by_hand() -> None:
    # class 1 where the mean is above 0.5. Brightness adds .05, .1, .15, .2, .3; contrast keeps the mean.
    model = linear([[0.0] * 12, [1 / 12] * 12], [0.5, 0.0])
    images = torch.tensor([0.46, 0.38, 0.25, 0.1, 0.7])[:, None, None, None].expand(5, 3, 2, 2)
    detector = TeCo(model, corruptions=("brightness", "contrast")).fit(labelled(images))
    assert detector._first_flips(images).tolist() == [[1, 3, 5, 6, 6], [6] * 5]
    close(detector.score(images), [2.5, 1.5, 0.5, 0.0, 0.0])


def test_teco_takes_the_first_flip() -> None:
    class Bands(nn.Module):
        """Class 1 for a mean in (0.5, 0.57): severity 1 turns it, severities 2 to 5 do not."""

        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((1, 2, 3))
            return torch.stack([torch.full_like(mean, 0.5), ((mean > 0.5) & (mean < 0.57)).float()], 1)

    images = torch.full((2, 3, 2, 2), 0.48)
    detector = TeCo(Bands(), corruptions=("brightness", "contrast")).fit(labelled(images))
    assert detector._first_flips(images).tolist() == [[1, 1], [6, 6]]


# --- corruptions ---


def pictures(count: int = 3, channels: int = 3, side: int = 32) -> Tensor:
    """Smooth pictures with some noise."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, channels, 4, 4), generator=generator)
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_corruption_is_of_the_image_alone(corruption: str, channels: int) -> None:
    images = pictures(channels=channels)
    before = images.clone()
    made = {severity: corrupt(images, corruption, severity) for severity in (1, 2, 3, 4, 5)}
    assert torch.equal(images, before)
    for severity, corrupted in made.items():
        assert corrupted.shape == images.shape and corrupted.dtype == torch.float32
        assert corrupted.min() >= 0 and corrupted.max() <= 1
        assert (corrupted - images).abs().amax((1, 2, 3)).min() > 1e-3, severity
        assert torch.equal(corrupt(images, corruption, severity), corrupted)
        for alone, image in zip(corrupted.flip(0), images.flip(0), strict=True):
            torch.testing.assert_close(corrupt(image[None], corruption, severity)[0], alone, atol=1e-6, rtol=0)
        again = corrupt(images.to(memory_format=torch.channels_last), corruption, severity)
        torch.testing.assert_close(again, corrupted, atol=1e-6, rtol=0)
    bytes_ = (images * 255).round().byte()
    assert torch.equal(corrupt(bytes_, corruption, 3), corrupt(bytes_.float() / 255, corruption, 3))


@pytest.mark.parametrize(
    "corruption", ["gaussian noise", "shot noise", "glass blur", "snow", "fog", "elastic transform"]
)
def test_the_seed_changes_what_is_random(corruption: str) -> None:
    images = pictures(1)
    assert not torch.equal(corrupt(images, corruption, 5, seed=1), corrupt(images, corruption, 5))


def test_each_severity_has_noise_of_its_own() -> None:
    plain = torch.full((1, 3, 32, 32), 0.5)
    one, two = ((corrupt(plain, "gaussian noise", severity) - 0.5).flatten() for severity in (1, 2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.1


@pytest.mark.parametrize("corruption", [name for name in CORRUPTIONS if "blur" in name or name in CORRUPTIONS[-4:]])
def test_what_only_moves_or_mixes_pixels_leaves_a_plain_image(corruption: str) -> None:
    plain = torch.full((1, 3, 32, 32), 102 / 255)
    for severity in (1, 2, 3, 4, 5):
        step = 1.01 / 255 if corruption == "jpeg compression" else 1e-5
        torch.testing.assert_close(corrupt(plain, corruption, severity), plain, atol=step, rtol=0)


@pytest.mark.parametrize(("severity", "scale", "photons", "share"), [(1, 0.04, 500, 0.01), (5, 0.10, 50, 0.07)])
def test_noise_has_the_strength_of_its_severity(severity: int, scale: float, photons: int, share: float) -> None:
    plain = torch.full((1, 3, 128, 128), 0.5)
    assert (corrupt(plain, "gaussian noise", severity) - 0.5).std() == pytest.approx(scale, rel=0.03)
    shot = corrupt(plain, "shot noise", severity)
    assert shot.mean() == pytest.approx(0.5, abs=0.002)
    assert shot.std() == pytest.approx(math.sqrt(0.5 / photons), rel=0.03)
    impulse = corrupt(plain, "impulse noise", severity)
    for value in (0.0, 1.0):
        assert (impulse == value).float().mean() == pytest.approx(share / 2, rel=0.15)
    assert ((impulse == 0.5) | (impulse == 0) | (impulse == 1)).all()


def test_brightness_contrast_and_pixelate_by_hand() -> None:
    image = torch.tensor([[0.4, 0.0], [0.2, 0.0], [0.1, 0.0]])[None, :, None]
    # HSV's value 0.4 becomes 0.6, the other channels grow with it; black becomes grey
    expected = torch.tensor([[0.6, 0.2], [0.3, 0.2], [0.15, 0.2]])[None, :, None]
    torch.testing.assert_close(corrupt(image, "brightness", 4), expected)
    # every channel around its own mean: 0.2, 0.1, 0.05
    expected = torch.tensor([[0.3, 0.1], [0.15, 0.05], [0.075, 0.025]])[None, :, None]
    torch.testing.assert_close(corrupt(image, "contrast", 2), expected)
    # 20x20 pixels at 0.95 are 19x19 and back; at 0.65 they are 13x13
    blocks = corrupt(pictures(1, side=20), "pixelate", 5)[0, 0]
    assert len(blocks.unique(dim=0)) == len(blocks.unique(dim=1).T) == 13


def test_zoom_blur_looks_to_the_middle() -> None:
    image = torch.zeros(1, 1, 33, 33)
    image[..., 16, 16] = 1
    blurred = corrupt(image, "zoom blur", 5)[0, 0]
    torch.testing.assert_close(blurred, blurred.T)
    torch.testing.assert_close(blurred, blurred.flip(0))
    assert blurred.argmax() == 16 * 33 + 16


def test_corrupt_refuses_wrong_arguments() -> None:
    images = pictures(1)
    with pytest.raises(ValueError, match="corruption must be one of gaussian noise, .*, got 'frost'"):
        corrupt(images, "frost", 1)
    for severity in (0, 6):
        with pytest.raises(ValueError, match=r"severity must be one of \(1, 2, 3, 4, 5\), got"):
            corrupt(images, "fog", severity)
    with pytest.raises(ValueError, match="images must have one or three channels, got 2"):
        corrupt(images[:, :2], "fog", 1)
    with pytest.raises(ValueError, match="images must have shape"):
        corrupt(images[0], "fog", 1)


# --- all four ---

Make = Callable[..., ImageDetector]

MAKERS: dict[str, Make] = {
    "STRIP": lambda model, **settings: STRIP(model, overlays=6, **settings),
    "ScaleUp": ScaleUp,
    "ScaleUp per class": lambda model, **settings: ScaleUp(model, scales=(1.5, 2, 3), per_class=True, **settings),
    "IBDPSC": lambda model, **settings: IBDPSC(model, error=0.2, **settings),
    "TeCo": TeCo,
}
every_detector = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def images_of_noise(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    height = torch.rand((count, 3, 1, 1), generator=generator)
    return torch.rand((count, 3, 8, 8), generator=generator) * height


def network() -> nn.Sequential:
    """Random weights, with batch norms that centre every logit: all classes are decided for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 3),
            nn.BatchNorm1d(3),
        )
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.normal_(module.bias, std=0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.train()(images_of_noise(200, seed=9))
    return model


CLEAN = labelled(images_of_noise(30, seed=0), torch.arange(30) % 3)
JUDGED = images_of_noise(24, seed=1)


@every_detector
def test_each_image_is_scored_by_itself(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make(network()).fit(CLEAN)
    together = detector.score(JUDGED)
    assert together.shape == (24,) and together.dtype == torch.float32 and len(together.unique()) > 2
    alone = torch.cat([detector.score(image[None]) for image in JUDGED])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(detector.score(JUDGED[order]), together[order], atol=1e-5, rtol=0)
    assert make(network()).fit(CLEAN).threshold_ == detector.threshold_  # the same seed, the same numbers
    monkeypatch.setattr("bclip_lab.detection.thresholds.images_at_once", lambda shape: 7)
    torch.testing.assert_close(detector.score(JUDGED), together, atol=1e-5, rtol=0)


@every_detector
def test_nothing_given_is_altered(make: Make) -> None:
    model, clean, judged = network(), labelled(CLEAN.images.clone(), CLEAN.labels.clone()), JUDGED.clone()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    detector = make(model)
    assert detector.fit(clean) is detector
    detector.detect(judged)
    assert torch.equal(judged, JUDGED) and torch.equal(clean.images, CLEAN.images)
    assert torch.equal(clean.labels, CLEAN.labels) and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


@every_detector
def test_bytes_and_labelled_images_are_scored_alike(make: Make) -> None:
    bytes_ = (CLEAN.images * 255).round().byte()
    detector = make(network()).fit(labelled(bytes_, CLEAN.labels))
    judged = (JUDGED * 255).round().byte()
    scores = detector.score(judged)
    assert torch.equal(detector.score(labelled(judged)), scores)
    torch.testing.assert_close(detector.score(judged.float() / 255), scores, atol=1e-6, rtol=0)


@every_detector
def test_detect_and_the_roc_curve_agree_on_ties(make: Make) -> None:
    detector = make(network(), fpr=0.2).fit(CLEAN)
    clean, judged = detector.score(CLEAN), detector.score(JUDGED)
    curve = RocCurve(clean, judged)
    points = set(zip(curve.false_positive_rate.tolist(), curve.true_positive_rate.tolist(), strict=True))
    for fpr in (0.01, 0.1, 0.2, 0.3, 0.49):
        detector.threshold_ = detector.threshold(fpr)
        assert detector.threshold_ in detector.scores_
        assert (detector.scores_ > detector.threshold_).mean() <= fpr
        rates = curve.rates_at(detector.threshold_)
        assert rates in points
        expected = (detector.detect(CLEAN).double().mean().item(), detector.detect(JUDGED).double().mean().item())
        assert rates == pytest.approx(expected)


@settings(max_examples=50)
@given(scores=st.lists(st.integers(0, 5), min_size=2, max_size=40), fpr=st.floats(0.001, 0.499))
def test_the_threshold_is_the_lowest_that_keeps_the_rate(scores: list[int], fpr: float) -> None:
    clean = np.array(scores, float)
    threshold = empirical_threshold(clean, fpr)
    assert threshold in scores
    assert (clean > threshold).sum() <= fpr * (len(scores) - 1) + 1e-9
    lower = clean[clean < threshold]
    assert not len(lower) or (clean > lower.max()).sum() > fpr * (len(scores) - 1) - 1e-9


class Planted(nn.Module):
    """Class 0 or 1 by the brighter half, class 3 where all is bright, and class 2 where a corner is white.

    The logits pass a batch norm that leaves them as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, eps=0)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[..., :16].mean((1, 2, 3)), x[..., 16:].mean((1, 2, 3))
        corner, all_ = x[..., -2:, -2:].mean((1, 2, 3)), x.mean((1, 2, 3))
        return self.norm(torch.stack([10 * left, 10 * right, 800 * (corner - 0.95).relu(), 60 * (all_ - 0.6)], 1))


def halves(count: int, seed: int) -> Tensor:
    """One half dark, the other brighter."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.rand((count, 3, 32, 32), generator=generator)
    images[::2, ..., 16:] += 0.3
    images[1::2, ..., :16] += 0.3
    return images


@pytest.mark.parametrize("make", [lambda m: STRIP(m, overlays=10), ScaleUp, IBDPSC, TeCo])
def test_a_planted_trigger_scores_higher(make: Make) -> None:
    clean, judged = halves(30, seed=0), halves(20, seed=1)
    triggered = judged.clone()
    triggered[..., -2:, -2:] = 1
    detector = make(Planted().eval()).fit(LabelledImages(clean, 1 - torch.arange(30) % 2, (*CLASSES, "emu")))
    scores = detector.score(triggered)
    assert RocCurve(detector.score(judged), scores).auroc == 1
    assert detector.detect(triggered).all() and not detector.detect(judged).any()


@every_detector
def test_before_fit_there_is_no_score(make: Make) -> None:
    detector = make(network())
    for call in (detector.score, detector.detect):
        with pytest.raises(ValueError, match="call fit with clean images first"):
            call(JUDGED)
    with pytest.raises(ValueError, match="call fit with clean images first"):
        detector.threshold(0.01)


@every_detector
def test_wrong_images_and_rates_are_refused(make: Make) -> None:
    detector = make(network()).fit(CLEAN)
    with pytest.raises(ValueError, match="images must have shape"):
        detector.score(JUDGED[0])
    with pytest.raises(ValueError, match="images is empty"):
        detector.score(JUDGED[:0])
    with pytest.raises(ValueError, match=r"clean must hold at least \d images, got 1"):
        make(network()).fit(CLEAN[:1])
    for fpr in (0.0, 0.5, math.nan):
        with pytest.raises(ValueError, match=r"fpr must lie in \(0, 0.5\), got"):
            make(network(), fpr=fpr)
        with pytest.raises(ValueError, match=r"fpr must lie in \(0, 0.5\), got"):
            detector.threshold(fpr)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: STRIP(m, overlays=0), "overlays must be at least 1, got 0"),
        (lambda m: STRIP(m, weight=0.0), "weight must be positive and finite, got 0.0"),
        (lambda m: STRIP(m, weight=math.nan), "weight must be positive and finite, got nan"),
        (lambda m: ScaleUp(m, scales=()), r"scales must be at least one finite number above 1, got \(\)"),
        (lambda m: ScaleUp(m, scales=(3, 1)), r"scales must be at least one finite number above 1, got \(3, 1\)"),
        (lambda m: IBDPSC(m, factor=1.0), "factor must be finite and above 1, got 1.0"),
        (lambda m: IBDPSC(m, networks=0), "networks must be at least 1, got 0"),
        (lambda m: IBDPSC(m, error=1.0), r"error must lie in \(0, 1\), got 1.0"),
        (lambda m: TeCo(m, corruptions=("fog", "frost")), r"at least two of .*, got \('fog', 'frost'\)"),
        (lambda m: TeCo(m, corruptions=("fog",)), r"at least two of .*, got \('fog',\)"),
    ],
)
def test_wrong_settings_are_refused(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(network())


def test_strip_needs_images_to_lay_over_and_to_calibrate_on() -> None:
    with pytest.raises(ValueError, match="clean must hold at least 102 images, got 30"):
        STRIP(network()).fit(CLEAN)


def test_defaults_are_those_of_the_papers() -> None:
    strip, scale_up, ibd_psc, teco = (make(network()) for make in (STRIP, ScaleUp, IBDPSC, TeCo))
    assert (strip.overlays, strip.weight) == (100, 1.0)
    assert scale_up.scales == (3, 5, 7, 9, 11) and not scale_up.per_class
    assert (ibd_psc.factor, ibd_psc.networks, ibd_psc.error) == (1.5, 5, 0.6)
    assert teco.corruptions == CORRUPTIONS and len(CORRUPTIONS) == 14
