"""The rates of masks equal those of a count of single pixels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfmask.masking.masks import context_mask, object_mask
from cfmask.masking.validation import Tally, coverage, mask_rates, masks_at, tally


def by_pixels(mask: torch.Tensor, segmentation: torch.Tensor, patch: int) -> tuple[float, float, float]:
    """One image's rates as the paper defines them: the patch mask (P,) blown up to pixels, every pixel looked at."""
    height, width = segmentation.shape
    columns = width // patch
    masked = both = there = either = 0
    for y in range(height):
        for x in range(width):
            row, column = y // patch, x // patch
            in_grid = row < height // patch and column < columns
            m_cam = bool(mask[row * columns + column]) if in_grid else False
            m_seg = bool(segmentation[y, x])
            masked += m_cam
            there += m_seg
            both += m_cam and m_seg
            either += m_cam or m_seg
    if there == 0:
        return masked / (height * width), math.nan, math.nan
    return masked / (height * width), both / there, both / either


@st.composite
def scenes(draw):
    """Masks (N, T, P), segmentations (N, H, W), patch size; images need not be multiples of the patch."""
    patch = draw(st.integers(1, 4))
    height, width = draw(st.integers(patch, 11)), draw(st.integers(patch, 11))
    n, thresholds = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = rng.choice([0.0, 0.05, 0.5, 1.0], (2, n))
    patches = (height // patch) * (width // patch)
    masks = rng.random((n, thresholds, patches)) < shares[0, :, None, None]
    segmentations = rng.random((n, height, width)) < shares[1, :, None, None]
    return torch.from_numpy(masks), torch.from_numpy(segmentations), patch


@settings(max_examples=80, deadline=None)
@given(scenes())
def test_rates_are_those_of_counting_every_pixel(scene):
    masks, segmentations, patch = scene
    found = mask_rates(masks, coverage(segmentations, patch))
    expected = torch.tensor(
        [
            [by_pixels(mask, where, patch) for mask in of_image]
            for of_image, where in zip(masks, segmentations, strict=True)
        ],
        dtype=torch.float64,
    )
    for values, wanted in zip((found.image, found.object, found.iou), expected.unbind(-1), strict=True):
        assert torch.equal(values.nan_to_num(-1), wanted.nan_to_num(-1))  # exactly: integers, divided once


@settings(max_examples=30, deadline=None)
@given(scenes(), st.data())
def test_tallies_add_up_in_any_parts_and_leave_empty_objects_out_of_two_averages(scene, data):
    masks, segmentations, patch = scene
    found = mask_rates(masks, coverage(segmentations, patch))
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(masks), max_size=len(masks))))
    whole = tally(found, chosen)
    parts = [
        tally(mask_rates(masks[i : i + 1], coverage(segmentations[i : i + 1], patch)), chosen[i : i + 1])
        for i in range(len(masks))
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    for ours, theirs in zip(whole.to_lists(), total.to_lists(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)
    with_object = chosen & segmentations.flatten(1).any(1)
    assert whole.images == chosen.sum() and whole.with_object == with_object.sum()
    image, found_share, iou = (torch.tensor(values) for values in whole.means())
    assert torch.allclose(image, found.image[chosen].mean(0).float(), equal_nan=True)
    assert torch.allclose(found_share, found.object[with_object].mean(0).float(), equal_nan=True)
    assert torch.allclose(iou, found.iou[with_object].mean(0).float(), equal_nan=True)


def test_masks_at_thresholds_are_the_methods_own_also_where_relevance_is_at_the_threshold():
    thresholds = (0.0, 0.1, 0.3, 0.5, 0.7)
    cam = torch.tensor([[0.0, 0.1, 0.3, 0.5, 0.7, 1.0], [0.0] * 6, [2.0, 1.0, 0.6, 0.0, 0.0, 1.4]])
    for mask, of in (("object", object_mask), ("context", context_mask)):
        stacked = masks_at(cam, thresholds, mask)
        assert stacked.shape == (3, len(thresholds), 6)
        for i, threshold in enumerate(thresholds):
            assert torch.equal(stacked[:, i], of(cam, threshold))
    with pytest.raises(ValueError, match="random"):
        masks_at(cam, thresholds, "random")


def test_rates_of_an_example_computed_by_hand():
    """A 4 × 4 image of 2 × 2 patches; the object covers the first patch and half of the second."""
    segmentation = torch.zeros(1, 4, 4, dtype=torch.bool)
    segmentation[0, :2, :3] = True
    where = coverage(segmentation, 2)
    assert where.patches.tolist() == [[4, 2, 0, 0]] and where.total.tolist() == [6]
    masks = torch.tensor([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]]).bool()
    found = mask_rates(masks, where)
    assert found.image.tolist() == [[0.25, 0.5, 0.5, 0.0]]
    assert found.object.tolist() == [[4 / 6, 1.0, 0.0, 0.0]]
    assert found.iou.tolist() == [[4 / 6, 6 / 8, 0.0, 0.0]]


def test_a_tally_goes_through_json_without_a_change():
    segmentation = torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    masks = torch.rand(5, 2, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    before = tally(mask_rates(masks, coverage(segmentation, 2)))
    after = Tally.from_lists(json.loads(json.dumps(before.to_lists())))
    assert after.to_lists() == before.to_lists()
    assert (before + after).images == 10


def test_invalid_segmentations_are_refused():
    with pytest.raises(ValueError, match="bool"):
        coverage(torch.zeros(1, 4, 4), 2)
    with pytest.raises(ValueError, match="no patch of 8"):
        coverage(torch.zeros(1, 4, 4, dtype=torch.bool), 8)
