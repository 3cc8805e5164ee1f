"""The autoencoders of checkpoints: the documented use, bad input, tokens of any architecture, function space."""

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.epsilon_vae.function_space import FunctionVAE, affine, called, gains, inputs_of
from adaptive_lab.epsilon_vae.population import populations
from adaptive_lab.epsilon_vae.token_vae import StreamingAttentionPool, TokenVAE
from adaptive_lab.epsilon_vae.tokens import addresses, batch_of, from_tokens, tokens_of
from adaptive_lab.epsilon_vae.training import descend
from adaptive_lab.epsilon_vae.vae import FAR, CheckpointDecoder, CheckpointEncoder, EpsilonVAE, MetricPredictor, WeightBlockEmbedder
from adaptive_lab.evaluator import Evaluator, agreement
from adaptive_lab.knobs import KnobError
from adaptive_lab.learned_decoding import best_checkpoint, compare, nearest_checkpoint
from adaptive_lab.zoo import Zoo, grow


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    grow(folder, Zoo(runs=6, steps=150), many=4, workers=1, progress=False)
    return populations(folder)[0].split(share=0.34, seed=1)


def vae_of(n=1024, **more):
    return EpsilonVAE(checkpoint_dim=n, latent_dim=8, hidden_dim=32, n_metrics=3, **more)


def test_documented_use():
    torch.manual_seed(0)
    vae = EpsilonVAE(checkpoint_dim=1024, latent_dim=32, hidden_dim=256, n_metrics=3)
    checkpoints, metrics = torch.randn(10, 1024), torch.randn(10, 3)
    out = vae(checkpoints)
    assert {k: tuple(v.shape) for k, v in out.items()} == dict(z_mean=(10, 32), z_logvar=(10, 32), reconstructed=(10, 1024), predicted_metrics=(10, 3))
    vae = EpsilonVAE(checkpoint_dim=checkpoints.shape[1], latent_dim=32)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = vae.compute_loss(vae(checkpoints), checkpoints, metrics)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    z1, z2 = vae.encode(checkpoints[0]), vae.encode(checkpoints[1])
    way = [vae.decode((1 - alpha) * z1 + alpha * z2) for alpha in torch.linspace(0, 1, 10)]
    assert all(c.shape == (1024,) for c in way)
    front = vae.find_pareto_frontier(metrics, objectives=["minimize", "minimize", "minimize"])
    assert len(checkpoints[front]) == len(front) == len(metrics[front, 2]) > 0
    predicted = vae.predict_metrics(torch.randn(100, 32))
    assert predicted.shape == (100, 3) and vae.decode(torch.randn(100, 32)[predicted[:, 0].argmin()]).shape == (1024,)


def test_named_parts():
    vae = vae_of()
    for part, kind in dict(embedder=WeightBlockEmbedder, encoder=CheckpointEncoder, predictor=MetricPredictor, decoder=CheckpointDecoder).items():
        assert isinstance(getattr(vae, part), kind)


def test_one_checkpoint_and_other_shapes():
    vae = vae_of()
    one = vae(torch.randn(1024))
    assert one["z_mean"].shape == (8,) and one["reconstructed"].shape == (1024,) and one["predicted_metrics"].shape == (3,)
    with pytest.raises(ValueError, match="fit_scale"):
        vae.compute_loss(one, torch.randn(1024))
    with pytest.raises(ValueError, match="two at least"):
        vae.fit_scale(torch.randn(1, 1024))
    with pytest.raises(ValueError, match=r"\(4, 1000\).*1024"):
        vae(torch.randn(4, 1000))
    with pytest.raises(ValueError, match="row 2"):
        vae.encode(torch.stack([torch.zeros(1024), torch.zeros(1024), torch.full((1024,), float("nan"))]))
    with pytest.raises(ValueError, match="z has shape"):
        vae.decode(torch.zeros(9))
    with pytest.raises(KnobError):
        EpsilonVAE(checkpoint_dim=0)
    with pytest.raises(ValueError, match="objective"):
        vae.find_pareto_frontier(torch.randn(4, 3), ["minimize", "minimise-ish", "maximize"])
    with pytest.raises(ValueError):
        vae.find_pareto_frontier(torch.randn(4, 3), ["minimize"])


def test_missing_metrics_are_not_zero():
    c, m = torch.randn(6, 1024), torch.full((6, 3), 1000.0)
    m[::2] = torch.nan
    m[:, 2] = torch.nan
    vae = vae_of().fit_scale(c).fit_metrics(m).eval()
    assert vae.metric_mean[:2].tolist() == [1000, 1000] and vae.metric_spread[:2].tolist() == [1, 1]  # constant, and not pulled to zero
    out = vae(c)
    assert (out["predicted_metrics"][:, :2] - 1000).abs().max() < 10 and out["predicted_metrics"][:, 2].isnan().all()
    free = vae.metric_error(out["predicted_metrics"], m, 6)
    filled = m.clone()
    filled[::2, 0] = out["predicted_metrics"][::2, 0].detach()  # what was missing, as predicted: the error can only fall
    assert torch.isfinite(free) and vae.metric_error(out["predicted_metrics"], filled, 6) < free
    vae.compute_loss(out, c, m).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())
    nothing = vae.compute_loss(vae(c), c, torch.full((6, 3), torch.nan))
    assert torch.allclose(nothing, vae.compute_loss(vae(c), c))


def test_units_of_blocks_and_far_latents():
    c = torch.cat([torch.randn(20, 10) * 1e-3, torch.randn(20, 6) * 50], 1)
    vae = EpsilonVAE(checkpoint_dim=16, latent_dim=4, hidden_dim=32).by_blocks([10, 6]).fit_scale(c)
    assert 0.5 < vae.spread[0] / 1e-3 < 2 and 0.5 < vae.spread[-1] / 50 < 2
    for _ in range(5):
        vae.compute_loss(vae(c), c)
    z = vae.encode(c).detach()
    assert 0.3 < vae.distance(z).mean() < 2 and vae.distance(z[0] + 100) > FAR
    with pytest.raises(ValueError, match="lengths"):
        vae.by_blocks([10, 7])
    again = EpsilonVAE(checkpoint_dim=16, latent_dim=4, hidden_dim=32).by_blocks([10, 6])
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.eval().encode(c), vae.eval().encode(c)) and torch.equal(again.distance(z), vae.distance(z))


def test_same_seed_same_fit():
    def fitted(seed):
        c = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
        vae = EpsilonVAE(checkpoint_dim=64, latent_dim=4, hidden_dim=16, seed=seed)
        torch.randn(seed + 3)  # what others draw does not matter
        descend(vae, lambda i: vae.compute_loss(vae(c[i]), c[i]), 8, epochs=3, batch_size=4, progress=False)
        return vae.encode(c)
    assert torch.equal(fitted(0), fitted(0)) and not torch.equal(fitted(0), fitted(1))


ARCHITECTURES = {
    "perceptron": lambda: nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "scale alone": lambda: nn.LayerNorm(5),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("width", [1, 3, 32])
def test_tokens_there_and_back(name, width):
    state = ARCHITECTURES[name]().state_dict()
    t = tokens_of(state, width)
    back = from_tokens(t, state)
    assert list(back) == list(state)
    assert all(torch.allclose(back[n].float(), w.float(), atol=1e-6) for n, w in state.items())
    assert addresses(t).isfinite().all() and not t.values[~t.mask].any()


def test_padding_changes_nothing():
    torch.manual_seed(0)
    vae = TokenVAE(width=8, token_latent=3, latent_dim=4, hidden_dim=16).eval()
    read = [tokens_of(make().state_dict(), 8) for make in ARCHITECTURES.values()]
    _, together, _ = vae.posterior(*batch_of(read))
    alone = torch.cat([vae.posterior(*batch_of([t]))[1] for t in read])
    assert torch.allclose(together, alone, atol=1e-5)
    with pytest.raises(ValueError, match="too few|too many"):
        from_tokens(read[0], ARCHITECTURES["convolutions"]().state_dict())


def test_pool_with_huge_scores():
    pool = StreamingAttentionPool(2, 1)
    with torch.no_grad():
        pool.query.weight.copy_(torch.tensor([[1.0, 0.0]]))
    e = torch.tensor([[[1e3, 1.0], [-1e3, 2.0], [2e3, 3.0], [2e3, 5.0]]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert pool(zip(e.split(1, 1), mask.split(1, 1)))[0, 1] == 4
    assert pool([(e, torch.zeros_like(mask))]).isfinite().all()


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def test_function_space_layers():
    net = convolutional().eval()
    X = torch.randn(20, 1, 12, 12)
    assert called(net, X) == ["0", "3", "7"] and affine(net[0])
    assert inputs_of(net, "7", X).shape == (20, 7)  # six channels and a one
    assert all((g > 0).all() for g in gains(net, called(net, X), X).values())
    assert all(p.grad is None for p in net.parameters())
    shared = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="more than once"):
        called(nn.Sequential(shared, shared), torch.randn(4, 3))
    with pytest.raises(ValueError, match="no Linear"):
        called(nn.LayerNorm(3), torch.randn(4, 3))


def test_function_space_on_unseen_runs(zoo):
    known, held = zoo
    judge = known.evaluator()
    vae = FunctionVAE(step=0.002).fit(known, progress=False)
    X = judge.tests["test"][0]
    for i in held.last():
        true = held.state(i)
        code = vae.encode(true, judge)
        back = vae.decode(code, judge)
        assert agreement(judge.outputs(true, X), judge.outputs(back, X)) > 0.9
        assert all(back[n].shape == w.shape and back[n].dtype == w.dtype for n, w in true.items())
    fine, state = vae.bits(code), held.state(0)
    vae.knobs.step = 0.05
    assert vae.bits(vae.encode(true, judge)) < fine / 2
    vae.knobs.step = 0
    with pytest.raises(ValueError, match="not rounded"):
        vae.bits(vae.encode(true, judge))
    with pytest.raises(ValueError, match="two at least"):
        FunctionVAE().fit(known.only(lambda c, one=known.rows[0]: c is one), progress=False)
    other = Evaluator(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), judge.probes, judge.tests)
    with pytest.raises(ValueError, match="layers 1"):
        vae.encode(other.build().state_dict(), other)
    with pytest.raises(ValueError, match="which this architecture has not"):
        vae.decode(code, other)


def test_order_of_units_does_not_matter(zoo):
    known, held = zoo
    judge = known.evaluator()
    vae = FunctionVAE(step=0.002).fit(known, progress=False)
    state = held.state(held.last()[0])
    order = torch.randperm(len(state["1.bias"]), generator=torch.Generator().manual_seed(0))
    other = dict(state) | {"1.weight": state["1.weight"][order], "1.bias": state["1.bias"][order], "3.weight": state["3.weight"][:, order]}
    a, b = (vae.encode(s, judge) for s in (state, other))
    assert (a.latents["1"][order] - b.latents["1"]).abs().max() <= 1 and abs(vae.bits(a) - vae.bits(b)) < 50


def test_table_and_its_rivals(zoo):
    known, held = zoo
    rows = compare(known, held, {"best checkpoint": best_checkpoint, "nearest checkpoint": nearest_checkpoint, "itself": lambda *a: lambda s: (s, 1, 32.0)}, progress=False)
    best, near, itself = rows
    assert itself["agreement"] == 1 and itself["difference"] == 0 and 0 < best["agreement"] < 1
    assert np.isclose(itself["final_gain"], 1 - best["final_agreement"]) and itself["gain_95"][0] <= itself["gain"] <= itself["gain_95"][1]
    assert best["accuracy"] >= max(c.metrics["accuracy"] for c in known.rows) - 1e-6
    with pytest.raises(ValueError, match="both populations"):
        compare(known, known, {"best checkpoint": best_checkpoint})
