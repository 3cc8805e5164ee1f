"Learned gates: their distribution, gradients, budgets, what is written into the model and cut out, and what they refuse."
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from adaptive_lab.controller.gates import BernoulliGates, Gating, HardConcreteGates, gated_loss, open_logit, part_costs, stretched
from adaptive_lab.controller.model import AdaptiveTransformer, Gates
from adaptive_lab.knobs import KnobError
from adaptive_lab.training import train

ALL = ("heads", "ffn", "layers")
X = torch.randint(256, (4, 9), generator=torch.Generator().manual_seed(1))


def model(seed=0, layers=2, heads=3):
    torch.manual_seed(seed)
    return AdaptiveTransformer(layers, heads, 12, context=8, hidden=20)


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(gates, seed=0):
    "The same gates with learned numbers that differ."
    with torch.no_grad():
        for kind in gates.kinds:
            getattr(gates, kind).normal_(0.5, 3, generator=drawn(seed))
    return gates


@pytest.mark.parametrize("how", [dict(), dict(beta=0.3), dict(gamma=-0.5, zeta=1.3), dict(beta=1.5, gamma=-0.01, zeta=2.0)])
def test_the_share_of_open_gates_is_the_formula(how):
    k, n = Gating(**how), 100_000
    for a in (-4.0, -1.0, 0.0, 2.0):
        z, p = stretched(torch.tensor(a), torch.rand(n, generator=drawn()), k), torch.sigmoid(open_logit(torch.tensor(a), k)).item()
        assert abs((z > 0).float().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-6
        at_one = 1 - 1 / (1 + math.exp(a - k.beta * math.log((1 - k.gamma) / (k.zeta - 1))))  # by symmetry of the logistic
        assert abs((z == 1).float().mean().item() - at_one) < 4.5 * math.sqrt(at_one * (1 - at_one) / n) + 1e-6


@pytest.mark.parametrize("kind", [HardConcreteGates, BernoulliGates])
@pytest.mark.parametrize("start", [0.05, 0.5, 0.99])
def test_gates_start_as_open_as_asked(kind, start):
    gates = kind(model(), ALL, start=start)
    assert all(torch.allclose(p, torch.tensor(start)) for p in gates.chances())
    share = gates.sample(drawn(), rows=4000).heads.gt(0).float().mean().item()
    assert abs(share - start) < 5 * math.sqrt(start * (1 - start) / 24_000)


@pytest.mark.parametrize("kind", [HardConcreteGates, BernoulliGates])
@pytest.mark.parametrize("cost", ["parts", "parameters", "flops"])
@pytest.mark.parametrize("kinds", [("heads",), ("ffn", "layers"), ALL])
def test_the_expected_cost_is_the_mean_of_the_costs(kind, cost, kinds):
    m = model()
    m.set_gate(1, 2, 0), m.set_gate(0, "ffn", 0), m.prune()
    gates, n = spread(kind(m, kinds, cost)), 20_000
    z, c = gates.sample(drawn(), rows=n), part_costs(m, cost)
    counted = [c.heads if {"heads", "layers"} & set(kinds) else 0 * c.heads, c.ffn if {"ffn", "layers"} & set(kinds) else 0 * c.ffn]
    each = ((z.heads * z.layers[..., None] > 0) * counted[0]).sum((1, 2)) + ((z.ffn * z.layers > 0) * counted[1]).sum(-1)
    assert abs(each.mean().item() - gates.expected().item()) < 5 * (each.std() / n**0.5).item() + 1e-3
    assert gates.share().item() == pytest.approx(gates.expected().item() / (counted[0].sum() + counted[1].sum()).item())


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("target", [1.0, 0.4])
def test_gradients_reach_every_gate(rows, target):
    m = model()
    gates = HardConcreteGates(m, ALL, start=0.5, target=target, per_row=rows is not None)
    for _ in range(20):
        gated_loss(gates)(m, (X[:, :-1], X[:, 1:])).backward()
    for p in gates.parameters():
        assert p.grad.isfinite().all() and (p.grad != 0).all()


def test_gradient_of_a_drawn_gate_is_that_of_its_formula():
    a, u, k = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True), torch.linspace(0.3, 0.7, 9, dtype=torch.float64), Gating()
    assert torch.autograd.gradcheck(lambda a: stretched(a, u, k), a)
    extreme = stretched(torch.tensor([0.0, 0.0], requires_grad=True), torch.tensor([0.0, 1 - 2**-24]), k)
    assert extreme.tolist() == [0, 1] and extreme.sum().requires_grad


@pytest.mark.parametrize("kind", [HardConcreteGates, BernoulliGates])
def test_same_seed_same_bits_and_rows_differ(kind):
    gates = kind(model(), ALL, start=0.5)
    a, b = gates.sample(drawn(3), rows=50), gates.sample(drawn(3), rows=50)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and a.heads.shape == (50, 2, 3) and a.ffn.shape == a.layers.shape == (50, 2)
    assert len({tuple(r.flatten().tolist()) for r in a.heads}) > 20 and gates.sample(drawn(3)).heads.shape == (2, 3)
    before = torch.get_rng_state()
    gated_loss(gates)(gates.model, (X[:, :-1], X[:, 1:]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kinds", [("heads",), ("heads", "ffn"), ALL])
def test_what_is_absent_stays_at_zero_while_the_rest_learns(kinds):
    m = model()
    gates = HardConcreteGates(m, kinds, start=0.6)
    adam = torch.optim.Adam([*m.parameters(), *gates.parameters()], 0.01)
    batches = [(X[:, :-1], X[:, 1:])]
    for step in train(m, adam, batches, steps=6, loss=gated_loss(gates)):
        if step.index == 2:
            m.set_gate(0, 1, 0), m.set_gate(1, "ffn", 0), m.prune(adam)
        if step.index > 2:
            for g in (gates.sample(drawn(), rows=5), gates.deterministic(), gates.chances(), gates.within(0.5)):
                assert (g.heads[..., 0, 1] == 0).all() and (g.ffn[..., 1] == 0).all()
    assert math.isfinite(step.loss)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kinds", [("heads",), ("ffn",), ("heads", "ffn"), ("layers",), ALL])
def test_written_and_pruned_says_what_the_gates_said(kinds, seed):
    m = model(seed)
    gates = spread(HardConcreteGates(m, kinds), seed)
    for g in (gates.deterministic(), gates.within(0.7)):
        twin = AdaptiveTransformer.from_state(m.state_dict())
        weights = {n: p.clone() for n, p in twin.named_parameters()}
        gates.write(twin, g)
        assert all(torch.equal(p, weights[n]) for n, p in twin.named_parameters()) and all(torch.equal(a, b) for a, b in zip(twin.gates, g))
        masked = m(X[:, :8], gates=g)
        twin.prune()
        assert (twin(X[:, :8]) - masked).abs().max() < 1e-5
        assert int(twin.present_heads.sum()) == int((g.heads * g.layers[:, None] > 0).sum())


@pytest.mark.parametrize("cost", ["parts", "parameters", "flops"])
@pytest.mark.parametrize("kinds", [("heads",), ("heads", "ffn"), ALL])
def test_a_budget_is_kept_by_the_likeliest(cost, kinds):
    m = model()
    gates, c = spread(HardConcreteGates(m, kinds, cost)), part_costs(m, cost)
    ffn = c.ffn if "ffn" in kinds else 0 * c.ffn
    total = (c.heads.sum() + ffn.sum()).item()
    chances = gates.chances()
    p = torch.cat([chances.heads * chances.layers[:, None], *([(chances.ffn * chances.layers)[:, None]] if "ffn" in kinds else [])], 1)
    for budget in torch.linspace(0.4, 1, 13).tolist():
        g = gates.within(budget)
        open_ = torch.cat([g.heads * g.layers[:, None], *([(g.ffn * g.layers)[:, None]] if "ffn" in kinds else [])], 1).bool()
        assert ((g.heads * c.heads).sum() + (g.ffn * ffn).sum()).item() <= budget * total * (1 + 1e-6)
        assert open_.all() or p[open_].min() >= p[~open_].max()
    assert all(torch.equal(t, torch.ones_like(t)) for t in gates.within(1.0))


def test_every_number_of_heads_can_be_kept_exactly():
    gates = spread(HardConcreteGates(model()))
    assert [int(gates.within(n / 6).heads.sum()) for n in range(1, 7)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_lagrangian_reaches_its_target(target):
    m = model()
    gates = HardConcreteGates(m, ALL, "flops", target=target, warmup=20)
    adam = torch.optim.Adam([dict(params=m.parameters(), lr=1e-3), dict(params=gates.parameters(), lr=0.1)])
    shares = [gates.share().item() for step in train(m, adam, [(X[:, :-1], X[:, 1:])], steps=150, loss=gated_loss(gates))]
    assert abs(sum(shares[-20:]) / 20 - target) < 0.03


def test_a_price_without_a_target_closes_more_the_higher_it_is():
    shares = []
    for strength in (0.0, 1.0, 10.0):
        m = model()
        gates = HardConcreteGates(m, strength=strength)
        adam = torch.optim.Adam([dict(params=m.parameters(), lr=0.0), dict(params=gates.parameters(), lr=0.1)])
        for step in train(m, adam, [(X[:, :-1], X[:, 1:])], steps=40, loss=gated_loss(gates)):
            pass
        shares.append(gates.share().item())
    assert shares[0] > shares[1] > shares[2] and shares[2] < 0.2


@pytest.mark.parametrize("kinds", [("heads",), ("ffn", "layers")])
def test_bernoulli_probabilities_sum_to_one_and_give_the_entropy(kinds):
    m = model(layers=1)
    m.set_gate(0, 1, 0), m.prune()
    gates = spread(BernoulliGates(m, kinds))
    free = [(k, i) for k in kinds for i in ([0, 2] if k == "heads" else [0])]
    total, entropy = 0.0, 0.0
    for bits in itertools.product([0.0, 1.0], repeat=len(free)):
        g = type(m.gates)(*(torch.zeros_like(t) for t in m.gates))
        for (k, i), b in zip(free, bits):
            getattr(g, k).flatten()[i] = b
        p = gates.log_prob(g).exp().item()
        total, entropy = total + p, entropy - p * math.log(p)
    assert total == pytest.approx(1, abs=1e-6) and entropy == pytest.approx(gates.entropy().item(), abs=1e-5)
    rows = gates.sample(drawn(), rows=7)
    one = [gates.log_prob(type(rows)(*(t[i] if t.ndim > own.ndim else t for t, own in zip(rows, m.gates)))) for i in range(7)]
    assert gates.log_prob(rows).shape == (7,) and torch.allclose(gates.log_prob(rows), torch.stack(one))


def test_reinforce_finds_the_head_that_pays():
    gates = BernoulliGates(model(layers=1, heads=3), start=0.5)
    sgd, g = torch.optim.SGD(gates.parameters(), 0.3), drawn()
    for _ in range(150):
        z = gates.sample(g, rows=32)
        reward = z.heads[:, 0, 0] - 0.3 * z.heads[:, 0].sum(-1)
        (-(gates.log_prob(z) * (reward - reward.mean())).mean()).backward()
        sgd.step(), sgd.zero_grad()
    assert gates.deterministic().heads.tolist() == [[1, 0, 0]]


def test_the_state_of_gates_round_trips(tmp_path):
    m = model()
    gates = HardConcreteGates(m, ALL, target=0.5)
    adam = torch.optim.Adam(gates.parameters(), 0.1)
    for _ in range(3):
        gated_loss(gates, 1)(m, (X[:, :-1], X[:, 1:])).backward()
        adam.step()
    torch.save(gates.state_dict(), tmp_path / "gates.pt")
    again = HardConcreteGates(m, ALL, target=0.5)
    again.load_state_dict(torch.load(tmp_path / "gates.pt", weights_only=True))
    assert "blocks" not in str(list(gates.state_dict())) and again.draws == 3 and again.multiplier == gates.multiplier != 0
    assert torch.equal(gated_loss(again, 1)(m, (X[:, :-1], X[:, 1:])), gated_loss(gates, 1)(m, (X[:, :-1], X[:, 1:])))


@pytest.mark.parametrize(
    "fault, kind, words",
    [
        (lambda m: HardConcreteGates(torch.nn.Linear(2, 2)), TypeError, "model is a Linear"),
        (lambda m: HardConcreteGates(m, ()), ValueError, "kinds=()"),
        (lambda m: HardConcreteGates(m, ("heads", "heads")), ValueError, "each once"),
        (lambda m: HardConcreteGates(m, "head"), ValueError, "kinds=('head',)"),
        (lambda m: HardConcreteGates(m, cost="time"), ValueError, "cost='time'"),
        (lambda m: HardConcreteGates(m, start=1.0), KnobError, "start=1.0"),
        (lambda m: HardConcreteGates(m, zeta=1.0), KnobError, "zeta=1.0"),
        (lambda m: HardConcreteGates(m, target=0.0), KnobError, "target=0.0"),
        (lambda m: HardConcreteGates(m).sample(drawn(), rows=-1), ValueError, "rows=-1"),
        (lambda m: HardConcreteGates(m).within(0.0), ValueError, "budget=0.0"),
        (lambda m: HardConcreteGates(m).within(0.1), ValueError, "0.167"),
        (lambda m: HardConcreteGates(m).within(1.5), ValueError, "budget=1.5"),
        (lambda m: HardConcreteGates(m).within(math.nan), ValueError, "budget=nan"),
        (lambda m: HardConcreteGates(m).write(model(layers=1)), ValueError, "(2, 3) does not fit"),
        (lambda m: BernoulliGates(m).log_prob(m.gates._replace(heads=torch.full((2, 3), 0.5))), ValueError, "other values than 0 and 1"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(fault, kind, words):
    m = model()
    before = {n: t.clone() for n, t in m.state_dict().items()}
    with pytest.raises(kind) as e:
        fault(m)
    assert words in str(e.value) and all(torch.equal(t, before[n]) for n, t in m.state_dict().items())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("value", [7.0, -0.1, float("nan"), None])
def test_gates_that_cannot_be_written_change_nothing(kind, value):
    m = model()
    new = [g * 0.5 for g in m.gates]
    at = ALL.index(kind)
    if value is None:
        new[at] = new[at][:-1]
    else:
        new[at].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"gates.{kind} "):
        HardConcreteGates(m).write(gates=Gates(*new))
    assert all((g == 1).all() for g in m.gates) and m.undo() == ""
    HardConcreteGates(m).write(gates=Gates(*(g * 0.5 for g in m.gates)))
    assert all((g == 0.5).all() for g in m.gates)
