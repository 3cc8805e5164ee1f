"Drawings that can be pointed at: valid, escaped, quick enough to be short, and true to the data."
import base64
import re
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_lab.heat import PALETTE, UNKNOWN
from adaptive_lab.maps import NOT_FINITE, Frame, Scale, contour, landscape, nearest, scale_of, scatter, scatter3, turn

NASTY = '<script>alert("1")</script> & \'x\''
numbers = st.floats(-1e6, 1e6)


def read(svg):
    "The drawing as a tree; fails where it is no XML, or a number in it is none."
    assert not re.search(r"\bnan\b|\binf\b|NaN|Infinity", re.sub(r"base64,[^\"]*|>[^<]*<|aria-label=\"[^\"]*\"", "", svg))
    return ET.fromstring(svg)


def dots(svg):
    "The pixels of all dots of a drawing."
    return {(float(x), float(y)) for x, y in re.findall(r"M(-?[\d.e+-]+) (-?[\d.e+-]+)h0", svg)}


def image(svg):
    "The pixels of the first image of a drawing: (rows, columns, 3)."
    file = base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])
    width, height, depth, kind = *(int.from_bytes(file[k : k + 4], "big") for k in (16, 20)), file[24], file[25]
    assert (depth, kind) == (8, 2)
    size = int.from_bytes(file[33:37], "big")
    raw = np.frombuffer(zlib.decompress(file[41 : 41 + size]), np.uint8).reshape(height, 1 + 3 * width)
    return raw[:, 1:].reshape(height, width, 3)


@given(x0=numbers, y0=numbers, dx=st.floats(1e-3, 1e6), dy=st.floats(1e-3, 1e6), at=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(max_examples=80, deadline=None)
def test_there_and_back(x0, y0, dx, dy, at):
    frame = Frame((40, 20, 240, 120), (x0, x0 + dx), (y0, y0 + dy))
    (w, h), point = (frame.xlim[1] - x0, frame.ylim[1] - y0), (x0 + at[0] * dx, y0 + at[1] * dy)
    back = frame.to_data(*frame.to_pixels(point))
    assert abs(back[0] - point[0]) <= 1e-9 * (w + abs(x0)) and abs(back[1] - point[1]) <= 1e-9 * (h + abs(y0))
    assert frame.to_pixels((x0, y0)).tolist() == [40, 120]


def test_each_point_is_drawn_where_the_frame_says():
    xy = np.random.default_rng(0).normal(size=(500, 2))
    xy[7] = np.nan
    svg, frame = scatter(xy, "t", xy[:, 0], "x")
    read(svg)
    want = {tuple(p) for p in (np.rint(frame.to_pixels(np.delete(xy, 7, 0)) * 10) / 10).tolist()}
    assert dots(svg) == want


def test_colours_follow_the_values_and_missing_ones_are_grey():
    svg, frame = scatter([(0, 0), (1, 0), (2, 0)], "t", [0.0, 1.0, np.nan], "v")
    colour = {}
    for d, c in re.findall(r'<path d="([^"]*h0)" stroke="(#\w+)"', svg):
        colour |= {p: c for p in dots(d)}
    low, high, grey = (colour[tuple((np.rint(frame.to_pixels((x, 0)) * 10) / 10).tolist())] for x in (0, 1, 2))
    brightness = lambda c: sum(bytes.fromhex(c[1:]))
    assert grey == "#" + bytes(PALETTE[UNKNOWN].tolist()).hex() and brightness(low) < brightness(high)


def test_lines_go_through_each_run_in_order_and_break_at_a_hole():
    xy = [(0, 0), (5, 5), (1, 1), (np.nan, 0), (2, 2), (6, 6)]
    svg, frame = scatter(xy, "t", runs=["a", "b", "a", "a", "a", "b"])
    line = re.search(r'<path d="([^"]*)" fill="none" stroke="currentColor" stroke-opacity=".25"', svg)[1]
    px = lambda *p: "{:g} {:g}".format(*(np.rint(frame.to_pixels(p) * 10) / 10))
    assert line == f"M{px(0, 0)}L{px(1, 1)}M{px(2, 2)}M{px(5, 5)}L{px(6, 6)}"


def test_text_is_escaped_everywhere():
    xy, grid = np.eye(2), np.ones((3, 3))
    for svg in (scatter(xy, NASTY, [0, 1], NASTY, runs=[NASTY] * 2, marks=[(0, 0, NASTY)], axes=(NASTY, NASTY))[0],
                landscape(grid, range(3), range(3), NASTY, NASTY, marks=[(1, 1, NASTY)], axes=(NASTY, NASTY))[0],
                scatter3(np.eye(3), NASTY, axes=(NASTY,) * 3)[0]):
        assert "<script" not in svg and read(svg).attrib["aria-label"].startswith(NASTY)


@pytest.mark.parametrize("xy", [np.zeros((0, 2)), [(1, 1)], [(2, 3)] * 4, [(np.nan, np.inf)], [(1e-300, 1e300), (0, 0)]])
def test_odd_points(xy):
    values = np.full(len(xy), 7.0)
    for svg, frame in (scatter(xy, "t"), scatter(xy, "t", values, "v", log=True, runs=np.zeros(len(xy)), front=np.ones(len(xy), bool))):
        read(svg)
        assert np.isfinite(frame.to_data(100, 100)).all()
    three = np.column_stack([np.reshape(xy, (-1, 2)), np.zeros(len(xy))])
    svg, pixels = scatter3(three, "t", front=range(len(xy)))
    read(svg)
    assert pixels.shape == (len(xy), 2)


def test_a_mask_and_numbers_choose_the_same_front():
    p = np.random.default_rng(0).normal(size=(30, 3))
    mask = p[:, 0] > 0
    assert scatter(p[:, :2], "t", front=mask)[0] == scatter(p[:, :2], "t", front=np.flatnonzero(mask))[0]
    assert scatter3(p, "t", mask)[0] == scatter3(p, "t", np.flatnonzero(mask))[0] != scatter3(p, "t")[0]


def test_a_grid_is_drawn_upwards_with_its_own_colours_for_what_is_not_finite_and_not_measured():
    v = np.array([[1.0, 2.0, 4.0], [np.inf, np.nan, 8.0]])
    svg, frame = landscape(v, [0, 1, 2], [0, 1], "t")
    read(svg)
    seen = image(svg)
    assert seen.shape == (2, 3, 3) and tuple(seen[0, 0]) == NOT_FINITE and tuple(seen[0, 1]) == tuple(PALETTE[UNKNOWN])
    assert tuple(seen[1, 0]) == tuple(PALETTE[0]) and tuple(seen[0, 2]) == tuple(PALETTE[UNKNOWN - 1])
    middle = PALETTE[round(254 / 3)]  # 2 is a third of the way from 1 to 8, by the logarithm
    assert tuple(seen[1, 1]) == tuple(middle) and "1 not finite" in svg
    assert frame.xlim == (-0.5, 2.5) and frame.ylim == (-0.5, 1.5)  # a cell lies about its point
    done = np.array([[True] * 3, [True, True, False]])
    assert tuple(image(landscape(v, [0, 1, 2], [0, 1], "t", done=done)[0])[0, 1]) == NOT_FINITE  # NaN, and measured
    with pytest.raises(ValueError, match=r"\(3, 2\) is wanted"):
        landscape(v, [0, 1], [0, 1, 2], "t")


@pytest.mark.parametrize("v", [np.full((3, 3), np.nan), np.zeros((3, 3)), np.full((3, 3), np.inf), np.full((3, 3), 2.0), -np.ones((3, 3)), np.diag([1e-300, 1e300, 1])])
def test_odd_grids(v):
    for log in (True, False):
        read(landscape(v, [0, 1, 2], [0, 1, 2], "t", log=log, path=[(0, 0), (np.nan, 1), (2, 2)])[0])


def test_contours_lie_where_the_surface_has_their_height():
    rng = np.random.default_rng(0)
    y, x = np.indices((20, 30))
    plane = 0.3 * x - 0.2 * y
    for level in (-1.0, 0.11, 3.0):
        ends = contour(plane, level).reshape(-1, 2)
        assert len(ends) and np.allclose(0.3 * ends[:, 0] - 0.2 * ends[:, 1], level)
    rough = rng.normal(size=(12, 12))
    ends = contour(rough, 0.2)
    keys, count = np.unique(ends.reshape(-1, 2).round(9), axis=0, return_counts=True)
    inside = ((keys > 1e-9) & (keys < 11 - 1e-9)).all(1)
    assert (count[inside] == 2).all()  # lines end only at the rim


def test_nearest():
    pixels = np.array([[0, 0], [10, 0], [np.nan, 5]])
    assert nearest(pixels, 8, 1) == 1 and nearest(pixels, 100, 100) is None and nearest(np.zeros((0, 2)), 0, 0) is None


@given(azimuth=st.floats(-720, 720), elevation=st.floats(-90, 90))
@settings(max_examples=60, deadline=None)
def test_a_turn_keeps_lengths_and_angles(azimuth, elevation):
    t = turn(np.eye(3), azimuth, elevation)
    assert np.allclose(t @ t.T, np.eye(3)) and np.linalg.det(t) == pytest.approx(1)
    read(scatter3(np.eye(3), "t", azimuth=azimuth, elevation=elevation)[0])


def test_three_dimensions_are_drawn_where_they_are_told():
    p = np.random.default_rng(0).normal(size=(200, 3))
    p[3, 1] = np.nan
    svg, pixels = scatter3(p, "t", front=range(10), chosen=4)
    assert np.isnan(pixels[3]).all()
    assert dots(svg) == {tuple(q) for q in (np.rint(np.delete(pixels, 3, 0) * 10) / 10).tolist()}
    assert 0 < np.nanmin(pixels) and np.nanmax(pixels[:, 0]) < 460 and np.nanmax(pixels[:, 1]) < 380
    texts = {e.text for e in read(svg).iter() if e.tag.endswith("text")}
    assert {f"{v:.3g}" for c in np.delete(p, 3, 0).T for v in (c.min(), c.max())} <= texts  # the ranges are those of the data
    above, _ = scatter3(p, "t", elevation=90)
    assert above != svg


def test_a_scale_of_nothing_and_of_one_value():
    assert scale_of([np.nan], log=True).low > 0 and scale_of([3.0]).high > 3 and scale_of([-1.0, 0.0], log=True) == Scale(1.0, 2.0, True)


def test_drawings_stay_short():
    rng = np.random.default_rng(0)
    xy, p = rng.normal(size=(1500, 2)), rng.normal(size=(1500, 3))
    assert len(scatter(xy, "t", xy[:, 0], runs=np.arange(1500) // 16)[0]) < 60_000 and len(scatter3(p, "t")[0]) < 60_000
    assert len(landscape(np.exp(rng.normal(size=(51, 51))), range(51), range(51), "t")[0]) < 300_000  # noise is all contour
