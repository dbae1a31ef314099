"""bclip_lab.evaluation: ACC, ASR and RA by hand, the ROC, and how visible a trigger is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor, nn

from bclip_lab.attacks import AllToAll, AllToOne, BackdoorAttack, OneToOne
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, TriggeredImages
from bclip_lab.evaluation import Evaluation, RocCurve, SiteASR, Visibility, evaluate, site_asr

CLASSES = ("cat", "dog", "owl")


def shown_as(*decisions: int, classes: int = 3) -> Tensor:
    """Images (N, K, 1, 1) of which `Flatten`, as a classifier, decides so."""
    return torch.eye(classes)[list(decisions)][:, :, None, None]


@dataclass(frozen=True)
class Becomes:
    """A trigger after which the classifier decides as listed."""

    decisions: tuple[int, ...]

    def embed(self, images: Tensor) -> Tensor:
        assert len(images) == len(self.decisions)
        return shown_as(*self.decisions)


TEST = LabelledImages(shown_as(0, 1, 1, 1, 2, 0), torch.tensor([0, 0, 1, 1, 2, 2]), CLASSES)


# --- ACC, ASR, RA ---


def test_without_an_attack_there_is_accuracy_only() -> None:
    result = evaluate(nn.Flatten(), TEST)
    assert result.acc == pytest.approx(4 / 6) and (result.clean, result.triggered) == (6, 0)
    assert math.isnan(result.asr) and math.isnan(result.ra)
    assert repr(result) == "Evaluation(ACC 0.667 of 6)"


@pytest.mark.parametrize(
    ("label_map", "decisions", "asr", "ra"),
    [
        # rows 2 to 5, true 1 1 2 2: the two images that are of the target already are not counted
        (AllToOne(0), (0, 1, 2, 1), 1 / 4, 2 / 4),
        (AllToOne(0), (0, 0, 0, 0), 1, 0),
        (AllToOne(0), (1, 1, 2, 2), 0, 1),
        # rows 4 and 5, true 2: one turned, one neither turned nor right
        (OneToOne(2, 1), (1, 0), 1 / 2, 0),
        # all rows, true 0 0 1 1 2 2, targets 1 1 2 2 0 0
        (AllToAll(3), (1, 0, 2, 2, 2, 1), 3 / 6, 2 / 6),
    ],
)
def test_asr_and_ra_by_hand(label_map: AllToOne, decisions: tuple[int, ...], asr: float, ra: float) -> None:
    result = evaluate(nn.Flatten(), TEST, BackdoorAttack(Becomes(decisions), label_map))
    assert result.asr == pytest.approx(asr) and result.ra == pytest.approx(ra)
    assert result.acc == pytest.approx(4 / 6) and (result.clean, result.triggered) == (6, len(decisions))
    expected = f"Evaluation(ACC 0.667 of 6, ASR {asr:.3f}, RA {ra:.3f} of {len(decisions)})"
    assert repr(result) == expected


@given(rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 2)), min_size=1, max_size=12))
def test_decisions_are_counted(rows: list[tuple[int, int, int]]) -> None:
    decisions, labels, shifts = torch.tensor(rows).T
    targets = (labels + shifts) % 3
    images = TriggeredImages(torch.zeros(len(rows), 1, 1, 1), labels, targets, torch.arange(len(rows)), CLASSES)
    result = Evaluation.from_decisions(decisions, labels, decisions, images)
    turned = sum(d == (label + s) % 3 for d, label, s in rows)
    right = sum(d == label for d, label, _ in rows)
    assert result.acc == result.ra == pytest.approx(right / len(rows))
    assert result.asr == pytest.approx(turned / len(rows))
    assert result.asr + result.ra <= 1 + 1e-12


def test_bytes_are_evaluated_like_floats() -> None:
    bytes_ = LabelledImages((TEST.images * 255).byte(), TEST.labels, CLASSES)
    attack = BackdoorAttack(Becomes((0, 1, 2, 1)), AllToOne(0))
    assert evaluate(nn.Flatten(), bytes_, attack) == evaluate(nn.Flatten(), TEST, attack)


def test_a_model_is_judged_in_evaluation_mode_and_gets_its_mode_back() -> None:
    class OnlyInEvaluationMode(nn.Flatten):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(-x if self.training else x)

    model = OnlyInEvaluationMode().train()
    attack = BackdoorAttack(Becomes((0, 1, 2, 1)), AllToOne(0))
    assert evaluate(model, TEST, attack) == evaluate(nn.Flatten(), TEST, attack)
    assert model.training


def test_a_model_may_know_more_classes_but_not_fewer() -> None:
    two = LabelledImages(shown_as(0, 2, 1), torch.tensor([0, 1, 1]), CLASSES[:2])
    assert evaluate(nn.Flatten(), two).acc == pytest.approx(2 / 3)
    four = LabelledImages(TEST.images, TEST.labels, (*CLASSES, "bee"))
    with pytest.raises(ValueError, match="model has 3 classes, the images have 4"):
        evaluate(nn.Flatten(), four)


def test_an_empty_test_set_is_refused() -> None:
    with pytest.raises(ValueError, match="images is empty"):
        evaluate(nn.Flatten(), TEST[:0])
    with pytest.raises(ValueError, match="no image of the attack's source classes"):
        evaluate(nn.Flatten(), TEST[:2], BackdoorAttack(Becomes(()), AllToOne(0)))


# --- ROC ---

scores = st.lists(st.integers(-8, 8), min_size=1, max_size=15)


def test_a_curve_by_hand() -> None:
    curve = RocCurve([1.0, 2.0, 3.0, 4.0], [3.5, 5.0, 0.0])
    assert curve.auroc == pytest.approx((3 + 4 + 0) / 12)
    points = list(zip(curve.false_positive_rate.tolist(), curve.true_positive_rate.tolist(), strict=True))
    third = 1 / 3
    expected = [(0, 0), (0, third), (0.25, third), (0.25, 2 * third), (0.5, 2 * third)]
    expected += [(0.75, 2 * third), (1, 2 * third), (1, 1)]
    assert np.allclose(points, expected)
    assert curve.thresholds.tolist() == [math.inf, 5, 4, 3.5, 3, 2, 1, 0]
    for fpr, tpr in [(0.0, third), (0.2499, third), (0.25, 2 * third), (0.999, 2 * third), (1.0, 1.0)]:
        assert curve.tpr_at(fpr) == pytest.approx(tpr)
    assert curve.rates_at(3.0) == (0.25, pytest.approx(2 * third))
    assert curve.rates_at(3.5) == (0.25, pytest.approx(third))
    assert curve.rates_at(-1.0) == (1.0, 1.0)


def test_a_tie_counts_half() -> None:
    curve = RocCurve([1, 1], [1, 2])
    assert curve.auroc == pytest.approx(0.75)
    assert curve.tpr_at(0.5) == 0.5


def test_scores_come_as_lists_arrays_or_tensors() -> None:
    clean, triggered = [0.5, 1.5, 0.25], [2.0, 1.0]
    curves = [
        RocCurve(clean, triggered),
        RocCurve(np.array(clean, np.float32), np.array(triggered)),
        RocCurve(torch.tensor(clean), torch.tensor(triggered, dtype=torch.float64)),
    ]
    for curve in curves:
        assert curve.clean.dtype == np.float64 and curve.clean.tolist() == clean
        assert curve.triggered.tolist() == triggered and curve.auroc == pytest.approx(5 / 6)


@settings(max_examples=50)
@given(clean=scores, triggered=scores)
def test_auroc_is_the_share_of_pairs_in_order(clean: list[int], triggered: list[int]) -> None:
    pairs = [(t > c) + 0.5 * (t == c) for t in triggered for c in clean]
    curve = RocCurve(clean, triggered)
    assert curve.auroc == pytest.approx(sum(pairs) / len(pairs))
    assert RocCurve(triggered, clean).auroc == pytest.approx(1 - curve.auroc)
    for monotone in (lambda x: 3 * x - 7, np.exp, lambda x: x**3):
        mapped = RocCurve(monotone(np.array(clean, float)), monotone(np.array(triggered, float)))
        assert mapped.auroc == pytest.approx(curve.auroc)
    for rate in (curve.false_positive_rate, curve.true_positive_rate):
        assert rate[0] == 0 and rate[-1] == 1 and (np.diff(rate) >= 0).all()
    heights = (curve.true_positive_rate[1:] + curve.true_positive_rate[:-1]) / 2
    assert (heights * np.diff(curve.false_positive_rate)).sum() == pytest.approx(curve.auroc)
    for fpr, tpr in zip(curve.false_positive_rate, curve.true_positive_rate, strict=True):
        assert curve.tpr_at(fpr) >= tpr


@pytest.mark.parametrize(
    ("clean", "triggered", "name"),
    [
        ([], [1.0], "clean"),
        ([1.0], [], "triggered"),
        ([1.0, math.nan], [1.0], "clean"),
        ([1.0], [math.inf, 2.0], "triggered"),
    ],
)
def test_missing_and_infinite_scores_are_refused(clean: list[float], triggered: list[float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must hold at least one score and finite ones only"):
        RocCurve(clean, triggered)


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_a_rate_outside_its_range_is_refused(fpr: float) -> None:
    with pytest.raises(ValueError, match=r"fpr must lie in \[0, 1\], got"):
        RocCurve([0], [1]).tpr_at(fpr)


# --- visibility ---


def flat(*values: float, channels: int = 3) -> Tensor:
    """Images of 8x8 pixels, each of one grey."""
    return torch.tensor(values)[:, None, None, None].expand(-1, channels, 8, 8).clone()


def test_visibility_of_a_shift_by_hand() -> None:
    found = Visibility.from_images(flat(0.5), flat(0.6))
    assert found.l_inf == pytest.approx(0.1, rel=1e-5) and found.l_2 == pytest.approx(0.1 * math.sqrt(3 * 64), rel=1e-5)
    assert (found.changed, found.images) == (1, 1)
    assert found.psnr == pytest.approx(20, rel=1e-5)  # mean square 0.01
    # flat images have no variance: what is left of SSIM is the likeness of their means
    assert found.ssim == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4), rel=1e-5)


def test_visibility_of_one_pixel_by_hand() -> None:
    clean = flat(0.5)
    triggered = clean.clone()
    triggered[0, :2, 3, 4] = torch.tensor([0.2, 0.9])  # two channels of a pixel are one changed pixel
    found = Visibility.from_images(clean, triggered)
    assert found.changed == pytest.approx(1 / 64)
    assert found.l_inf == pytest.approx(0.4) and found.l_2 == pytest.approx(0.5)
    assert found.psnr == pytest.approx(10 * math.log10(192 / 0.25))


def test_visibility_is_taken_image_by_image_then_averaged() -> None:
    clean = flat(0.5, 0.5)
    found = Visibility.from_images(clean, flat(0.6, 0.51))
    assert found.psnr == pytest.approx((20 + 40) / 2, rel=1e-4)  # of the batch as a whole: 23
    assert found.l_inf == pytest.approx((0.1 + 0.01) / 2, rel=1e-4)
    assert found.l_2 == pytest.approx(math.sqrt(192) * (0.1 + 0.01) / 2, rel=1e-4)
    parts = [Visibility.from_images(clean[:1], flat(value)) for value in (0.6, 0.51)]
    assert found.ssim == pytest.approx(sum(part.ssim for part in parts) / 2)


def test_ssim_is_that_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand((1, 3, 16, 12), generator=generator)
    triggered = (0.7 * clean + 0.3 * torch.rand(clean.shape, generator=generator)).clamp(0, 1)

    def window(values: np.ndarray) -> np.ndarray:
        return np.stack([ndimage.gaussian_filter(v, 1.5, mode="mirror", truncate=3.5) for v in values])

    x, y = clean[0].double().numpy(), triggered[0].double().numpy()
    mean_x, mean_y = window(x), window(y)
    covariance = window(x * y) - mean_x * mean_y
    variances = window(x * x) - mean_x**2 + window(y * y) - mean_y**2
    index = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2)
    index /= (mean_x**2 + mean_y**2 + 0.01**2) * (variances + 0.03**2)
    assert Visibility.from_images(clean, triggered).ssim == pytest.approx(index.mean(), abs=1e-5)


def test_what_does_not_change_is_invisible() -> None:
    images = torch.rand((2, 1, 8, 9), generator=torch.Generator().manual_seed(0))
    found = Visibility.from_images(images, images.clone())
    assert (found.l_inf, found.l_2, found.changed, found.psnr) == (0, 0, 0, math.inf)
    assert found.ssim == pytest.approx(1)
    half = Visibility.from_images(flat(0.5, 0.5), flat(0.5, 0.6))
    assert half.psnr == math.inf and half.changed == 0.5  # one unchanged image is enough


def test_visibility_of_bytes_is_that_of_floats() -> None:
    clean = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    triggered = clean.clone()
    triggered[..., 2:4] = 255 - triggered[..., 2:4]  # in bytes a difference would wrap around
    before = clean.clone(), triggered.clone()
    assert Visibility.from_images(clean, triggered) == Visibility.from_images(clean / 255, triggered / 255)
    assert torch.equal(clean, before[0]) and torch.equal(triggered, before[1])


def test_visibility_of_many_images_is_the_mean_over_all_of_them() -> None:
    triggered = flat(*[0.6] * 500, 0.7, channels=1)  # more than one batch
    found = Visibility.from_images(flat(*[0.5] * 501, channels=1), triggered)
    assert found.images == 501 and found.l_inf == pytest.approx((500 * 0.1 + 0.2) / 501, rel=1e-5)


@pytest.mark.parametrize(
    ("clean", "triggered", "message"),
    [
        (flat(0.5), flat(0.5, 0.5), r"triggered must be as clean, torch.float32 \(1, 3, 8, 8\), got .* \(2, 3, 8, 8\)"),
        (flat(0.5), flat(0.5).byte(), "triggered must be as clean, .* got torch.uint8"),
        (flat(0.5), flat(1.5), r"triggered of dtype float32 must lie in \[0, 1\]"),
        (flat(0.5)[0], flat(0.5)[0], r"clean must have shape \(N, C, H, W\)"),
        (flat(), flat(), "clean is empty"),
        (flat(0.5)[..., :5], flat(0.5)[..., :5], "clean must be images of at least 6x6 pixels, got 8x5"),
    ],
)
def test_visibility_refuses(clean: Tensor, triggered: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Visibility.from_images(clean, triggered)


# --- sites ---


def two_sites() -> ClippedModel:
    """Both channels of two ReLUs in a row hold the image's value; the second is doubled and decides."""
    convolution = nn.Conv2d(1, 2, 1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    return ClippedModel(nn.Sequential(convolution, nn.ReLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def on_ones(count: int) -> TriggeredImages:
    zeros, ones = torch.zeros(count).long(), torch.ones(count).long()
    return TriggeredImages(torch.ones(count, 1, 2, 2), zeros, ones, torch.arange(count), ("a", "b"))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0.5, math.inf, {"1": SiteASR(0.0, 1.0), "2": SiteASR(1.0, 0.0)}),  # the first site does it
        (0.5, 0.5, {"1": SiteASR(0.0, 0.0), "2": SiteASR(0.0, 0.0)}),  # either is enough
        (math.inf, math.inf, {"1": SiteASR(1.0, 1.0), "2": SiteASR(1.0, 1.0)}),  # nobody does
    ],
)
def test_site_asr_tells_which_site_holds_a_backdoor_back(
    first: float, second: float, expected: dict[str, SiteASR]
) -> None:
    clipped = two_sites()
    bounds = {"1": torch.tensor([math.inf, first]), "2": torch.tensor([math.inf, second])}
    clipped.set_bounds(bounds)
    assert site_asr(clipped, on_ones(4)) == expected
    for site, bound in clipped.bounds.items():
        assert torch.equal(bound, bounds[site]), "the bounds are as before"


def test_site_asr_leaves_the_bounds_as_they_were_when_it_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = two_sites()
    clipped.set_bounds({"1": 0.5})
    before = clipped.bounds

    def broken_off(*_: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr("bclip_lab.evaluation.logits", broken_off)
    with pytest.raises(KeyboardInterrupt):
        site_asr(clipped, on_ones(2))
    assert all(torch.equal(bound, before[site]) for site, bound in clipped.bounds.items())


def test_site_asr_refuses_no_images() -> None:
    with pytest.raises(ValueError, match="triggered holds no images"):
        site_asr(two_sites(), on_ones(0))
