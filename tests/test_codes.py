"Codes: every bit back for every type, hostile and damaged codes refused, budgets kept, chains that do not drift, odd architectures."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptive_lab.epsilon_vae.codes import decode, decode_plainly, encode, encode_plainly
from adaptive_lab.epsilon_vae.entropy import LEVELS, LINE, Reader, Writer, frequencies, read_matrix, write_matrix
from adaptive_lab.epsilon_vae.lossless import WAYS, Code, decode_exactly, digest, encode_exactly, put_on, take_off
from adaptive_lab.epsilon_vae.quantize import decode_rows, encode_rows, levels, pack_bits, unpack_bits
from adaptive_lab.epsilon_vae.rounding import round_with_feedback, side
from adaptive_lab.evaluator import Evaluator, agreement
from adaptive_lab.store import Store

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
          torch.complex64, torch.complex128, *(getattr(torch, n) for n in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2") if hasattr(torch, n))]


def any_bits(dtype, shape, seed):
    "Any bit pattern that the type has: NaNs with payloads, minus zero, infinities among them."
    size = torch.empty(0, dtype=dtype).element_size()
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, (int(np.prod(shape, dtype=int)), size), dtype=np.uint8)
    return torch.from_numpy(raw).reshape(-1).view(dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parent", ["none", "other", "same", "misfit"])
def test_every_bit_of_every_type(dtype, parent):
    make = lambda seed: {str(s): any_bits(dtype, s, seed + i) for i, s in enumerate([(), (0,), (3, 0, 2), (1,), (7, 5), (2, 3, 4)])}
    state = make(0)
    base = {"none": None, "other": make(9), "same": make(0), "misfit": {"()": torch.ones(4), "(7, 5)": any_bits(dtype, (5, 7), 3)}}[parent]
    back = decode_exactly(encode_exactly(state, base), base)
    assert digest(back) == digest(state) and list(back) == list(state)
    assert all(back[n].dtype == t.dtype and back[n].shape == t.shape for n, t in state.items())


def test_values_that_compare_equal_or_never_do():
    state = {"x": torch.tensor([0.0, -0.0, float("nan"), -float("nan"), 1e-45]), "view": torch.arange(12.0).reshape(3, 4).T, "conj": torch.tensor([1 + 2j]).conj()}
    back = decode_exactly(encode_exactly(state))
    assert digest(back) == digest(state) and torch.signbit(back["x"]).tolist() == torch.signbit(state["x"]).tolist()
    assert torch.equal(back["view"], state["view"]) and torch.equal(back["conj"], state["conj"].resolve_conj())
    assert digest({"x": torch.tensor([0.0])}) != digest({"x": torch.tensor([-0.0])})


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]), st.sampled_from(WAYS))
def test_parents_come_off_and_on(seed, size, way):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 256, (9, size), dtype=np.uint8) for _ in range(2))
    assert (put_on(take_off(a, b, way), b, way) == a).all()


def test_a_flipped_bit_never_gives_another_state():
    state, parent = {"w": any_bits(torch.float32, (20, 10), 0)}, {"w": any_bits(torch.float32, (20, 10), 0)}
    parent["w"][:5] += 1
    code, told = encode_exactly(state, parent), 0
    for wrong in (None, {"w": parent["w"] + 1}):
        with pytest.raises(ValueError, match="parent"):
            decode_exactly(code, wrong)
    for bit in range(8 * code.size):
        data = code.data["bytes"].clone()
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert digest(decode_exactly(Code(code.kind, {"bytes": data}, code.meta, code.weights), parent)) == digest(state)
        except ValueError as e:
            told += "damaged" in str(e)
    assert told > 7 * code.size  # the last bits of a compressor mean nothing
    with pytest.raises(ValueError, match="plain bits"):
        encode_exactly({"s": torch.eye(3).to_sparse()})


def test_a_code_survives_the_store(tmp_path):
    state = {"w": torch.randn(8, 8), "n": torch.tensor(3)}
    for n, code in enumerate((encode_exactly(state), encode(state, 5.0)[0], encode_plainly(state, 4)[0])):
        Store(tmp_path).save("codes", n, code.state())
        back = Code.of(Store(tmp_path).load("codes", n))
        give = {"lossless": decode_exactly, "levels": decode, "rows": decode_plainly}[code.kind]
        assert digest(give(back)) == digest(give(code)) and back.bits == code.bits


def test_every_table_is_a_whole_line():
    for level in range(LEVELS):
        f = frequencies(level)
        assert sum(f) == 2**LINE and min(f) >= 1 and f[:-1] == f[:-1][::-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(0, 9), st.sampled_from([0, 0.1, 1, 30, 3000, 2**40]))
def test_numbers_come_back(seed, m, n, size):
    rng = np.random.default_rng(seed)
    Q = np.rint(rng.standard_normal((m, n)) * size).astype(np.int64)
    expected, halves = 2.0 ** rng.integers(-9, 9, n), rng.integers(-30, 30, m)
    w = Writer()
    write_matrix(w, Q, expected, halves)
    w.whole(-(2**70)), w.plain(5, 3)
    r = Reader(w.done())
    assert (read_matrix(r, m, n, expected, halves) == Q).all() and r.whole() == -(2**70) and r.plain(3) == 5 and r.at_end()
    assert abs(8 * len(w.done()) - w.price) <= 16


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    try:
        read_matrix(Reader(data), 5, 4)
    except ValueError:
        pass


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=30))
def test_packed_bits_come_back(k, numbers):
    numbers = np.array([n % 2**k for n in numbers], int)
    packed = pack_bits(numbers, k)
    assert len(packed) == -(-len(numbers) * k // 8) and (unpack_bits(packed, k, len(numbers)) == numbers).all()


@pytest.mark.parametrize("kind", ["even", "normal"])
@pytest.mark.parametrize("k", range(1, 9))
def test_rows_take_the_nearest_level(kind, k):
    W = np.random.default_rng(k).standard_normal((5, 40))
    W[2] = 0
    code = encode_rows(W, k, kind)
    at = code.scale.astype(float)[:, None, None] * levels(k, kind)
    assert np.allclose(np.abs(decode_rows(code) - W), np.abs(W[..., None] - at).min(-1), atol=1e-12)
    assert code.size == len(code.packed) + 2 * 5 + 1 and len(code.packed) == -(-200 * k // 8)


@pytest.mark.parametrize("k", [0, 9, 2.5j, 1.0 / 3])
def test_other_widths_are_refused(k):
    with pytest.raises((ValueError, TypeError)):
        encode_rows(np.ones((2, 2)), k)


def naive_rounding(W, C, G, powers, delta, order):
    "Each weight in turn; the rest is solved for by least squares with the full matrix of the quadratic form, as the definition has it."
    m, n = W.shape
    H, done, Q = np.kron(G, C), [], np.zeros((m, n))
    error, steps = np.zeros(m * n), (delta * np.exp2(powers[0])[:, None] * np.exp2(powers[1])).reshape(-1)
    for at in [i * n + j for i, j in order]:
        free = [x for x in range(m * n) if x not in done]
        wish = np.zeros(m * n)
        wish[free] = -np.linalg.solve(H[np.ix_(free, free)], H[np.ix_(free, done)] @ error[done]) if done else 0
        target = W.reshape(-1)[at] - wish[at]
        Q.reshape(-1)[at] = round(target / steps[at])
        error[at] = W.reshape(-1)[at] - Q.reshape(-1)[at] * steps[at]
        done.append(at)
    return Q


@pytest.mark.parametrize("seed", range(4))
def test_feedback_is_that_of_optimal_brain_surgery(seed):
    rng = np.random.default_rng(seed)
    A, B, W = rng.standard_normal((30, 5)), rng.standard_normal((30, 4)), rng.standard_normal((4, 5))
    C, G = A.T @ A / 30, B.T @ B / 30
    columns, rows = side(C, 5, 0.0), side(G, 4, 0.0)
    order = [(i, j) for j in columns.order[::-1] for i in rows.order[::-1]]
    Q = round_with_feedback(W, columns, rows, 0.7)
    assert (Q == naive_rounding(W, C, G, (rows.powers, columns.powers), 0.7, order)).all()


def judged(model, shape, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(300, *shape, generator=g)
    build = lambda: model_of(model)
    with torch.no_grad():
        y = build().eval()(X).argmax(-1)
    return Evaluator(build, X[:200], {"test": (X[200:], y[200:])})


def model_of(kind):
    torch.manual_seed(3)
    conv = lambda d: (nn.Conv1d if d == 1 else nn.Conv2d)
    return {"mlp": lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)),
            "no bias": lambda: nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False)),
            "half": lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).double(),
            "cnn": lambda: nn.Sequential(conv(2)(1, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)),
            "cnn1": lambda: nn.Sequential(conv(1)(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)),
            "groups": lambda: nn.Sequential(conv(2)(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)),
            "norm": lambda: nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))}[kind]()


@pytest.mark.parametrize("kind, shape", [("mlp", (12,)), ("no bias", (12,)), ("cnn", (1, 8, 8)), ("cnn1", (2, 8)), ("groups", (2, 8, 8)), ("norm", (12,))])
def test_codes_of_architectures(kind, shape):
    judge, state = judged(kind, shape), model_of(kind).state_dict()
    X = judge.tests["test"][0]
    for bits in (6.0, 9.0):
        code, made = encode(state, bits, judge)
        assert code.bits <= bits and digest(decode(code)) == digest(made) and list(made) == list(state)
    assert agreement(judge.outputs(state, X), judge.outputs(made, X)) >= 0.97


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_codes_of_types_and_odd_tensors(dtype):
    torch.manual_seed(0)
    state = {"w": torch.randn(6, 5, dtype=torch.float64).to(dtype), "b": torch.randn(6).to(dtype), "n": torch.tensor(2**40), "yes": torch.tensor([True]),
             "empty": torch.zeros(0, 4, dtype=dtype), "none": torch.zeros(0, dtype=dtype), "zero": torch.zeros(3, 3, dtype=dtype), "z": torch.tensor([1j]), "one": torch.tensor(0.3, dtype=dtype)}
    for base in (None, {n: t.clone() for n, t in state.items()}, {"w": state["w"] * 0.9}):
        code, made = encode(state, 14.0, base=base)
        assert digest(decode(code, base)) == digest(made) and all(made[n].dtype == t.dtype and made[n].shape == t.shape for n, t in state.items())
        assert torch.allclose(made["w"].double(), state["w"].double(), atol=0.1)  # half a step: of so few weights the header takes most of the bits
        assert all(torch.equal(made[n], state[n]) for n in ("n", "yes", "z", "one", "zero"))


def test_more_bits_are_better_and_feedback_beats_the_nearest():
    judge, state = judged("mlp", (12,)), model_of("mlp").state_dict()
    X = judge.tests["test"][0]
    said = judge.outputs(state, X).double().log_softmax(-1)
    left = lambda s: float((said.exp() * (said - judge.outputs(s, X).double().log_softmax(-1))).sum(-1).mean())  # Kullback-Leibler
    errors = [left(encode(state, b, judge)[1]) for b in (4.0, 6.0, 8.0)]
    assert errors[0] > errors[1] > errors[2] and errors[1] < left(encode(state, 6.0)[1])


def test_a_chain_does_not_drift():
    judge, state = judged("mlp", (12,)), model_of("mlp").state_dict()
    g, parent = torch.Generator().manual_seed(0), model_of("mlp").state_dict()
    for _ in range(15):
        state = {n: t + 0.05 * torch.randn(t.shape, generator=g) for n, t in state.items()}
        code, made = encode(state, 5.0, judge, parent)
        assert code.bits <= 5 and digest(decode(code, parent)) == digest(made)
        parent = made
    flat = lambda s: torch.cat([t.reshape(-1) for t in s.values()])
    alone = encode(state, 5.0, judge)[1]
    assert (flat(parent) - flat(state)).norm() < (flat(alone) - flat(state)).norm()


def test_wrong_bases_and_damaged_codes_are_refused():
    state, base = {"w": torch.randn(9, 9)}, {"w": torch.randn(9, 9)}
    for make, give in ((lambda: encode(state, 6.0, base=base)[0], decode), (lambda: encode_plainly(state, 4, base)[0], decode_plainly)):
        for wrong in (None, state):
            with pytest.raises(ValueError, match="base"):
                give(make(), wrong)
    code = encode(state, 6.0)[0]
    for cut in (0, 3, 10, code.size - 1):
        with pytest.raises(ValueError):
            decode(Code("levels", {"stream": code.data["stream"][:cut]}, code.meta, 81))
    with pytest.raises(ValueError, match="too few"):
        encode(state, 0.01)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="'w'.*not finite"):
            encode({"w": torch.tensor([[bad]])})


def test_a_network_that_says_nothing_is_coded_too():
    judge, state = judged("mlp", (12,)), {n: torch.zeros_like(t) for n, t in model_of("mlp").state_dict().items()}
    code, made = encode(state, 2.0, judge)
    assert digest(made) == digest(state) and code.bits <= 2


@pytest.mark.parametrize("make", [lambda s, b: encode(s, b), lambda s, b: encode_plainly(s, b)], ids=["levels", "rows"])
def test_no_code_of_independent_gaussian_weights_beats_the_bound(make):
    state = {"w": torch.randn(48, 64, generator=torch.Generator().manual_seed(1))}
    for bits in (2, 3, 4, 6):
        code, made = make(state, bits)
        assert ((state["w"] - made["w"]) ** 2).mean() / state["w"].var() > 4.0**-code.bits  # else bits were not counted


def test_small_tensors_of_any_range_survive_plain_codes():
    state = {"w.weight": torch.randn(4, 4), "w.bias": torch.full((4,), 1e6), "n.running_var": torch.tensor([1e5, 1e-9]), "b.bias": torch.tensor([1e-9, 70000.0], dtype=torch.float64)}
    made = encode_plainly(state, 8)[1]
    for name in ("w.bias", "n.running_var", "b.bias"):
        assert torch.allclose(made[name].double(), state[name].double(), rtol=1.1e-2, atol=0), name


def test_a_code_that_would_overflow_is_refused():
    with pytest.raises(ValueError, match="finite"):
        encode({"w.weight": torch.full((4, 4), 65504.0, dtype=torch.float16), "w.bias": torch.ones(4, dtype=torch.float16)}, 12)
