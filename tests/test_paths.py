"Alignment, repair, solved layers and learned paths: same function, exact ends, errors that name what is wrong."
import pytest
import torch
from torch import nn

from adaptive_lab.epsilon_vae.alignment import HOW, Group, NotUnderstood, align, match_weights, permuted, symmetries
from adaptive_lab.epsilon_vae.barriers import good_pairs
from adaptive_lab.epsilon_vae.curves import Bend, bent
from adaptive_lab.epsilon_vae.paths import LABEL_FREE, Pair, along, barrier, latent, linear, matched, slerp
from adaptive_lab.epsilon_vae.repair import Ends, blend, repair, solve
from adaptive_lab.evaluator import Evaluator

BUILDS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3),
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(1, 5, 3), nn.GELU()), nn.MaxPool2d(2), nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(20, 3))),
}


def made(kind, seed, dtype=torch.float32):
    torch.manual_seed(seed)
    net = BUILDS[kind]().to(dtype)
    for _ in range(3):
        net.train()(torch.randn(64, 1, 6, 6, dtype=dtype))
    return {n: t.clone() for n, t in net.state_dict().items()}


def judge_of(kind, dtype=torch.float32):
    X = torch.randn(80, 1, 6, 6, generator=torch.Generator().manual_seed(9), dtype=dtype)
    return Evaluator(lambda: BUILDS[kind]().to(dtype), X[:60], {"test": (X[60:], torch.arange(20) % 3)})


@pytest.fixture(params=BUILDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("seed", range(3))
def test_another_order_is_the_same_function(kind, seed):
    judge, state, groups = judge_of(kind, torch.float64), made(kind, seed, torch.float64), symmetries(BUILDS[kind]())
    other = permuted(state, groups, [torch.randperm(g.size) for g in groups])
    assert not all(torch.equal(other[n], state[n]) for n in state)
    assert (judge.outputs(other) - judge.outputs(state)).abs().max() < 1e-10


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_order_is_found_again(kind, how, seed):
    state, groups = made(kind, seed), symmetries(BUILDS[kind]())
    shuffled = permuted(state, groups, [torch.randperm(g.size) for g in groups])
    back = align(shuffled, state, judge_of(kind), how)
    assert all(torch.equal(back[n], state[n]) for n in state)


def test_weight_matching_never_ends_below_where_it_began(kind):
    a, b, groups = made(kind, 0), made(kind, 1), symmetries(BUILDS[kind]())
    alike = lambda x: sum((a[n].double() * x[n].double()).sum() for n in a if a[n].is_floating_point() and "running_" not in n)
    assert alike(permuted(b, groups, match_weights(b, a, groups))) >= alike(b)


@pytest.mark.parametrize("layer, named", [
    (nn.Softmax(1), "'1' is a Softmax"), (nn.LSTM(4, 4), "'1' is a LSTM"), (nn.Unflatten(1, (2, 2)), "'1' is a Unflatten"),
    (nn.TransformerEncoderLayer(4, 1), "1 is a TransformerEncoderLayer"),
])
def test_the_first_layer_not_understood_is_named(layer, named):
    with pytest.raises(NotUnderstood, match=named):
        symmetries(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2)))


def test_grouped_kernels_and_layers_used_twice_are_refused():
    twice = nn.Linear(4, 4)
    with pytest.raises(NotUnderstood, match="used twice"):
        symmetries(nn.Sequential(twice, nn.ReLU(), twice))
    with pytest.raises(NotUnderstood, match="groups=2"):
        symmetries(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def test_groups_of_ones_own():
    judge = Evaluator(Residual, torch.randn(50, 6), {})
    state, groups = Residual().state_dict(), [Group("act", 7, (("first.weight", 0), ("first.bias", 0), ("last.weight", 1)))]
    with pytest.raises(NotUnderstood, match="is a Residual, not nn.Sequential"):
        align(state, state, judge)
    shuffled = permuted(state, groups, [torch.randperm(7)])
    for how in HOW:
        back = align(shuffled, state, judge, how, groups=groups)
        assert all(torch.equal(back[n], state[n]) for n in state)
    with pytest.raises(ValueError, match="'last.weight', which is .2, 7"):
        align(state, state, judge, groups=[Group("act", 5, (("last.weight", 1),))])


def test_an_order_that_is_none_is_refused():
    groups = symmetries(BUILDS["mlp"]())
    with pytest.raises(ValueError, match="each of 0 to 11"):
        permuted(made("mlp", 0), groups, [torch.zeros(12, dtype=torch.int64), torch.arange(9)])


def test_every_path_has_the_ends_functions(kind):
    judge = judge_of(kind)
    pair = Pair(made(kind, 0), made(kind, 1), judge)
    said = [judge.outputs(s) for s in (pair.a, pair.b)]
    for name, way in LABEL_FREE.items():
        path = way(pair)
        for t, y in enumerate(said):
            assert torch.allclose(judge.outputs(path(float(t))), y, atol=1e-3), (name, t)
        assert path(0.5).keys() == pair.a.keys() and all(path(0.5)[n].dtype == t.dtype for n, t in pair.a.items())


def test_repair_sets_mean_and_deviation():
    judge, a, b = judge_of("mlp"), made("mlp", 0), made("mlp", 1)
    ends = Ends(a, b, judge)
    after = Ends(repair(blend(a, b, 0.3), ends, 0.3), b, judge).traces[0]
    for n in ("1", "3", "5"):
        for f in (lambda h: h.mean(0), lambda h: h.std(0)):
            assert torch.allclose(f(after[n]), 0.7 * f(ends.traces[0][n]) + 0.3 * f(ends.traces[1][n]), atol=1e-4)


def test_a_solved_layer_is_nearer_to_its_goal_than_the_blend(kind):
    judge = judge_of(kind)
    a, b = made(kind, 0), align(made(kind, 1), made(kind, 0), judge)
    ends = Ends(a, b, judge)
    goal = (judge.outputs(a) + judge.outputs(b)) / 2
    far = lambda s: (judge.outputs(s) - goal).square().mean()
    middle = blend(a, b, 0.5)
    assert far(solve(middle, ends, 0.5)) < far(middle)
    with pytest.raises(ValueError, match="ridge=0"):
        solve(middle, ends, 0.5, ridge=0)


def test_slerp_keeps_the_length_and_parallel_vectors_work():
    judge, a = judge_of("mlp"), made("mlp", 0)
    b = {n: t.flip(0) for n, t in a.items()}
    length = lambda s: sum(t.square().sum() for t in s.values()).sqrt()
    assert torch.isclose(length(slerp(Pair(a, b, judge))(0.5)), length(a))
    assert all(torch.equal(slerp(Pair(a, a, judge))(0.5)[n], a[n]) for n in a)


def test_a_jump_is_no_path():
    pair = Pair(made("mlp", 0), made("mlp", 1), judge_of("mlp"))
    jump = along(lambda t: pair.a if t < 0.5 else pair.b, pair.evaluator)
    assert barrier(jump)["largest_step"] == 1 and barrier(along(linear(pair), pair.evaluator))["largest_step"] < 0.051
    with pytest.raises(ValueError, match="points=5"):
        along(linear(pair), pair.evaluator, points=5)


def test_a_linear_coder_gives_the_matched_line_and_a_poor_one_exact_ends(kind):
    pair = Pair(made(kind, 0), made(kind, 1), judge_of(kind))
    floats = [n for n, t in pair.a.items() if t.is_floating_point()]

    class Half:
        def encode(self, s):
            return torch.cat([s[n].flatten() for n in floats]) / 2
        def decode(self, z):
            return {n: x.view_as(pair.a[n]) for n, x in zip(floats, z.split([pair.a[n].numel() for n in floats]))}

    path, line = latent(pair, Half()), matched(pair)
    learnt = [n for n in floats if "running_" not in n]
    assert all(torch.allclose(path(t)[n], line(t)[n], atol=1e-5) for t in (0.0, 0.4, 1.0) for n in learnt)


@pytest.mark.parametrize("control", [False, True])
def test_a_bend_starts_and_ends_at_the_ends_and_repeats(kind, control):
    judge = judge_of(kind)
    pair, knobs = Pair(made(kind, 0), made(kind, 1), judge), Bend(steps=3, probes=20)
    labelled = (judge.probes, torch.arange(60) % 3)
    path, again = (bent(pair, labelled, knobs, control) for _ in range(2))
    for t, end in enumerate((pair.a, pair.aligned())):
        assert all(torch.allclose(path(float(t))[n].double(), x.double(), atol=1e-5) for n, x in end.items() if x.is_floating_point())
    assert all(torch.equal(path(0.4)[n], again(0.4)[n]) for n in pair.a)


def test_nothing_to_learn_from_and_divergence_are_told():
    pair = Pair(made("mlp", 0), made("mlp", 1), judge_of("mlp"))
    with pytest.raises(ValueError, match="labelled is None"):
        bent(pair, None, Bend(probes=0))
    pair.a["1.weight"] = pair.a["1.weight"] * float("nan")
    with pytest.raises(FloatingPointError, match="at step 0"):
        bent(pair, None, Bend(steps=2), how=None)


def test_states_of_two_architectures_are_refused():
    with pytest.raises(ValueError, match="b is of another architecture"):
        Pair(made("mlp", 0), made("cnn", 0), judge_of("mlp"))
