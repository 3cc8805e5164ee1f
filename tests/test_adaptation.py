"Adaptation at inference: slopes against plain loops, passes counted at the model, the way back to the last bit, and what is refused."
import copy

import pytest
import torch
from torch.nn import functional as F

from adaptive_lab.controller import forward_steps
from adaptive_lab.controller.adaptation import Adaptation, Adapter, gain
from adaptive_lab.controller.forward_steps import Passes, box_step, gate_steps, put
from adaptive_lab.controller.model import AdaptiveTransformer, Gates
from adaptive_lab.controller.thumbs import Liking, Thumbs, as_vector
from adaptive_lab.data.dialects import dialect_bytes
from adaptive_lab.data.streams import Windows
from adaptive_lab.training import train

CONTEXT, SHORT = 16, Adaptation(budget=30)


def text_of(form, windows=192, step=0):
    return Windows(dialect_bytes(form, "numbers", 60_000)[0], CONTEXT, windows, seed=9)[step]


@pytest.fixture(scope="module")
def learnt():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        m = AdaptiveTransformer(2, 3, 24, CONTEXT)
    for _ in train(m, torch.optim.Adam(m.parameters(), 5e-3), Windows(dialect_bytes("code", "numbers", 60_000)[0], CONTEXT, 16, 0), steps=250):
        pass
    return m.eval()


@pytest.fixture
def model(learnt):
    return copy.deepcopy(learnt)


def bits(m):
    return [t.clone() for t in (*m.gates, *m.parameters())]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b))


def counted(m, f):
    "Windows that went through the model in a call of f, and what it returned."
    rows = []
    hook = m.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    try:
        return f(), sum(rows)
    finally:
        hook.remove()


# -- slopes and steps ------------------------------------------------------------------------------------------------------------------


def plain(m, z, x, y, generator, samples, eps):
    "Loss, gradient and curvature, byte by byte, as the formulas say."
    movable = Passes(m, x, y).movable
    log_p = lambda window, z: m(window[None], movable.gates(z))[0].log_softmax(-1)  # (T, 256)
    loss, gradient, curvature, many = 0.0, torch.zeros(len(z)).double(), torch.zeros(len(z), len(z)).double(), x.numel()
    for window, true in zip(x, y):
        here = log_p(window, z)
        turned = [eps if z[i] < 0.5 else -eps for i in range(len(z))]
        slopes = [(log_p(window, z + e * torch.eye(len(z)).to(z)[i]) - here) / e for i, e in enumerate(turned)]
        drawn = torch.multinomial(here.softmax(-1), samples, replacement=True, generator=generator)
        for t in range(len(true)):
            loss -= here[t, true[t]].item() / many
            gradient -= torch.stack([s[t, true[t]] for s in slopes]).double() / many
            for c in drawn[t]:
                s = torch.stack([s[t, c] for s in slopes]).double()
                curvature += torch.outer(s, s) / samples / many
    return loss, gradient, curvature


@pytest.mark.parametrize("rows", [1, 5, 16])
@torch.no_grad()
def test_slopes_are_those_of_plain_loops(model, rows):
    m, (x, y) = model.double(), text_of("upper", 3)
    z = torch.linspace(0, 1, Passes(m, x, y).movable.size).double()
    passes = Passes(m, x, y, rows=rows)
    found = passes.slopes(z, torch.arange(3), torch.Generator().manual_seed(3), samples=2, eps=0.01)
    loss, gradient, curvature = plain(m, z, x, y, torch.Generator().manual_seed(3), 2, 0.01)
    assert found.loss == pytest.approx(loss, rel=1e-9) and passes.count == len(z) + 1
    assert torch.allclose(found.gradient, gradient, rtol=1e-7, atol=1e-10) and torch.allclose(found.curvature, curvature, rtol=1e-7, atol=1e-10)


def test_the_gradient_is_that_of_a_backward_pass(model):
    m, (x, y) = model.double(), text_of("upper", 4)
    passes = Passes(m, x, y)
    z = torch.full((passes.movable.size,), 0.7).double()
    found = passes.slopes(z, torch.arange(4), torch.Generator(), eps=1e-6)
    z.requires_grad_()
    (true,) = torch.autograd.grad(F.cross_entropy(m(x, passes.movable.gates(z)).flatten(0, 1), y.flatten()), z)
    assert torch.allclose(found.gradient, true, atol=1e-5) and true.abs().max() > 1e-3


@torch.no_grad()
def test_losses_are_those_of_cross_entropy_for_any_gates(model):
    m, (x, y) = model.double(), text_of("hex", 7)
    for seed in range(3):
        passes = Passes(m, x, y, rows=3)
        z = torch.rand(passes.movable.size, generator=torch.Generator().manual_seed(seed)).double()
        true = F.cross_entropy(m(x, passes.movable.gates(z)).flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)
        assert torch.allclose(passes.losses(z), true, rtol=1e-9)


def test_a_step_in_the_box_is_the_least_there():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        A, slope, z = torch.randn(6, 6, generator=g).double(), torch.randn(6, generator=g).double(), torch.rand(6, generator=g).round(decimals=1)
        C = A @ A.T + 0.1 * torch.eye(6)
        d = box_step(slope, C, z)
        new, left = z + d, slope + C @ d  # Karush, Kuhn and Tucker
        assert new.min() >= -1e-9 and new.max() <= 1 + 1e-9
        free = (new > 1e-6) & (new < 1 - 1e-6)
        assert (left[free].abs() < 1e-4).all() and (left[new <= 1e-6] > -1e-4).all() and (left[new >= 1 - 1e-6] < 1e-4).all()


@pytest.mark.parametrize("budget", [1, 2.5, 11, 40])
def test_passes_are_counted_as_the_model_counts_them(model, budget):
    x, y = text_of("upper", 10)
    passes = Passes(model, x, y, rows=4, budget=budget)
    path, rows = counted(model, lambda: list(gate_steps(passes, passes.movable.vector())))
    assert passes.count == rows / 10 <= budget
    assert all(b.value <= a.value for a, b in zip(path, path[1:])) and all(0 <= f.z.min() and f.z.max() <= 1 for f in path)


# -- the adapter -----------------------------------------------------------------------------------------------------------------------


def test_an_adaptation_counts_all_its_passes(model):
    adapter, (x, y) = Adapter(model, SHORT), text_of("upper")
    outcome, rows = counted(model, lambda: adapter.adapt(x, y))
    (learn, _), (held, _) = adapter.split(x, y)
    assert rows == outcome.passes * len(learn) + 3 * len(held) and outcome.passes <= 30
    assert torch.equal(learn, x[: len(learn)]) and torch.equal(held, x[len(learn) :])


def test_the_way_back_is_exact(model):
    model.set_gate(0, 1, 0.3)
    model.set_gate(1, "layer", 0.7)
    model.set_gate(1, 2, 0.0)
    model.prune()
    x, before = text_of("code", 4)[0], bits(model)
    with torch.no_grad():
        logits = model(x)
    adapter = Adapter(model, SHORT)
    kept = [adapter.adapt(*text_of(form)).kept for form in ("upper", "hex", "code")]
    assert kept[:2] == ["adapted", "adapted"] and not same(bits(model)[:3], before[:3]) and same(bits(model)[3:], before[3:])
    back = 0
    while adapter.rollback():
        back += 1
    with torch.no_grad():
        assert back >= 2 and same(bits(model), before) and torch.equal(model(x), logits)
    assert adapter.setting is None


def test_the_same_again_has_the_same_bits_and_leaves_the_global_generator(model):
    state, found = torch.get_rng_state(), []
    for _ in range(2):
        adapter = Adapter(copy.deepcopy(model), SHORT)
        found.append((adapter.adapt(*text_of("spread")), list(adapter.model.gates)))
    (a, gates), (b, other) = found
    assert same(gates, other) and same(a.tried, b.tried) and (a.gain, a.loss, a.passes) == (b.gain, b.loss, b.passes)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_held_back_part_does_not_confirm_is_left(model):
    (x, y), (own, after) = text_of("hex"), text_of("code")
    before, adapter = bits(model), Adapter(model, SHORT)
    outcome = adapter.adapt(torch.cat([x[:128], own[:64]]), torch.cat([y[:128], after[:64]]))
    assert outcome.kept == "home" and same(bits(model), before) and not same(outcome.tried, adapter.home)
    assert not adapter.rollback() and not adapter.memory


def test_a_gain_is_that_of_a_t_test_over_blocks():
    from scipy.stats import ttest_1samp

    d = torch.randn(40, generator=torch.Generator().manual_seed(0)).double() + 0.4
    found, test = gain(d, torch.zeros(40), 0.05), ttest_1samp(d.view(8, 5).mean(1).numpy(), 0)
    assert found.mean == pytest.approx(d.mean().item()) and found.low == pytest.approx(test.confidence_interval(0.9).low)


def test_text_of_its_own_kind_sends_the_model_home(model):
    before, adapter = bits(model), Adapter(model, SHORT)
    adapter.adapt(*text_of("hex"))
    assert adapter.watch(*text_of("hex", step=1)).mean > 0 and adapter.setting
    assert adapter.watch(*text_of("code", step=1)).mean < 0
    assert same(bits(model), before) and adapter.setting is None


def test_a_task_that_returns_is_recognised(model):
    adapter, kept = Adapter(model, SHORT), {}
    for step, form in enumerate(("upper", "hex", "upper", "hex")):
        outcome = adapter.adapt(*text_of(form, step=step))
        assert outcome.setting and (step < 2 or outcome.began in kept[form])
        kept.setdefault(form, set()).add(outcome.setting)
    other = Adapter(copy.deepcopy(model))
    other.load_state_dict(adapter.state_dict())
    assert [s.number for s in other.memory] == [s.number for s in adapter.memory] and other.setting.number == adapter.setting.number
    put(other.model, other.home)
    assert Adapter(copy.deepcopy(other.model)).adapt(*text_of("upper", step=5)).began is None  # one without the memory
    assert other.adapt(*text_of("upper", step=5)).began in kept["upper"]


def test_a_setting_that_was_disliked_is_not_tried_again(model):
    before, adapter = bits(model), Adapter(model, SHORT)
    assert adapter.thumb(True) is False  # at home there is nothing to judge
    number = adapter.adapt(*text_of("upper")).setting
    assert adapter.thumb(False) and same(bits(model), before)
    assert adapter.adapt(*text_of("upper", step=1)).began is None and number in {s.number for s in adapter.memory}


# -- what is refused -------------------------------------------------------------------------------------------------------------------

X, Y = text_of("code")


@pytest.mark.parametrize(
    "x, y, what",
    [
        (X[:0], Y[:0], "at least one byte"), (X[:, :0], Y[:, :0], "at least one byte"), (X[:9], Y[:9], "too few"), (X, Y[:-1], "no text"),
        (X.float(), Y, "x of torch.float32"), (X, Y + 300, "y of torch.int64"), (X.repeat(1, 2), Y.repeat(1, 2), "longer than the model's context"), (None, Y, "no text"),
    ],
)
def test_unusable_texts_change_nothing(model, x, y, what):
    adapter = Adapter(model, SHORT)
    before, state = bits(model), str(adapter.state_dict())
    with pytest.raises(ValueError, match=what):
        adapter.adapt(x, y)
    assert same(bits(model), before) and str(adapter.state_dict()) == state


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
def test_gates_outside_of_0_to_1_are_refused(model, value):
    before, g = bits(model), [t.clone() for t in model.gates]
    g[0][1, 2] = value
    for f in (lambda: put(model, Gates(*g)), lambda: Passes(model, X, Y).movable.vector(Gates(*g)), lambda: Thumbs(model).propose(Gates(*g))):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            f()
    assert same(bits(model), before)


@pytest.mark.parametrize("gates", [lambda g: g._replace(heads=g.heads[:1]), lambda g: g._replace(ffn=None)])
def test_gates_of_another_shape_are_refused(model, gates):
    with pytest.raises(ValueError, match="does not fit the model"):
        put(model, gates(model.gates))


def test_gates_do_not_open_what_was_removed(model):
    gates = Gates(*(g.clone() for g in model.gates))
    model.set_gate(0, 0, 0.0)
    model.prune()
    with pytest.raises(ValueError, match="removed"):
        put(model, gates)
    assert model.gate_heads[0, 0] == 0


@pytest.mark.parametrize("at", ["at once", "on the way"])
def test_a_loss_that_is_no_number_changes_nothing(model, at, monkeypatch):
    adapter = Adapter(model, SHORT)
    adapter.adapt(*text_of("upper"))
    state, gates = str(adapter.state_dict()), [g.clone() for g in model.gates]
    if at == "at once":
        with torch.no_grad():
            model.norm.weight[0] = float("nan")
    else:
        def step(*_):
            raise FloatingPointError("the loss is nan")
        monkeypatch.setattr(forward_steps, "along", step)
    with pytest.raises(FloatingPointError, match="nan"):
        adapter.adapt(*text_of("hex"))
    assert str(adapter.state_dict()) == state and same(model.gates, gates) and not model.training


@pytest.mark.parametrize("kind, knobs", [(Adaptation, dict(budget=0)), (Adaptation, dict(held_back=1.0)), (Liking, dict(stride=0)), (Liking, dict(most=0))])
def test_knobs_outside_their_range_are_refused(kind, knobs):
    with pytest.raises(ValueError):
        kind(**knobs)


# -- thumbs ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likes", [1, -1])
def test_gates_move_to_what_is_liked(likes):
    ends = []
    for seed in range(6):
        m = AdaptiveTransformer(2, 3, 24, CONTEXT)
        for where in range(3):
            m.set_gate(0, where, 0.5)
        thumbs, gates = Thumbs(m, seed=seed), m.gates
        for _ in range(40):  # a person who looks at one head of eight
            tried = thumbs.propose(gates)
            moved = (tried.heads[0, 1] - gates.heads[0, 1]).item()
            gates = thumbs.reward(likes * (1 if moved > 0 else -1) if moved else 0.0)
        ends.append(gates.heads[0, 1].item())
        worth, unsure = thumbs.learned()
        assert likes * worth[1] > 0.5 * unsure[1]
    assert ends == [1.0 if likes > 0 else 0.0] * 6


def test_without_a_thumb_nothing_changes(model):
    before, thumbs = bits(model), Thumbs(model)
    learned = thumbs.learned()
    tried = [thumbs.propose() for _ in range(5)]
    assert same(bits(model), before) and same(thumbs.learned(), learned) and same(model.gates, before[:3])
    assert any(not torch.equal(as_vector(t), as_vector(model.gates)) for t in tried)
    assert same(thumbs.reward(0.0), model.gates) and thumbs.learned()[0].abs().max() == 0  # neither up nor down: no lesson


@pytest.mark.parametrize("r", [2, -1.5, float("nan"), float("inf")])
def test_a_thumb_that_is_none_is_refused(model, r):
    thumbs = Thumbs(model)
    thumbs.propose()
    state = str(thumbs.state_dict())
    with pytest.raises(ValueError, match="thumb"):
        thumbs.reward(r)
    assert str(thumbs.state_dict()) == state
    with pytest.raises(ValueError, match="no sample waits"):
        Thumbs(model).reward(1)
