"The generator against loops written by hand, in one process and in two."
import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from adaptive_lab.data.streams import Batches
from adaptive_lab.training import NonFiniteLoss, Training, train

TWO = """
import json, os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from adaptive_lab.data.streams import Batches
from adaptive_lab.training import Training, train

torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
X, y = torch.randn(240, 20, generator=g), torch.randint(0, 5, (240,), generator=g)
out = {}
for kind in ("stream", "loader", "accumulate"):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 5))
    opt = torch.optim.Adam(model.parameters(), lr=.01)
    if kind == "loader":
        batches = DataLoader(TensorDataset(X, y), batch_size=24, shuffle=True, generator=torch.Generator().manual_seed(2))
    else:
        batches = Batches(X, y, batch_size=24, seed=3)
    settings = Training(accumulate=3 if kind == "accumulate" else 1, clip=.5, device="cpu")
    out[kind] = [s.loss for s in train(model, opt, batches, steps=30, settings=settings)]
    out[kind + "_weight"] = model[0].weight.double().sum().item()
if int(os.environ.get("RANK", 0)) == 0:
    json.dump(out, open(sys.argv[1], "w"))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()  # else its threads may still run when the interpreter goes
"""


def launch(tmp_path, processes, monkeypatch):
    "One runs in this process, more are run by torchrun."
    script, out = tmp_path / "two.py", tmp_path / f"{processes}.json"
    script.write_text(TWO)
    if processes == 1:
        monkeypatch.setattr(sys, "argv", [str(script), str(out)])
        runpy.run_path(str(script), run_name="__main__")
        return json.loads(out.read_text())
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
               "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_two_processes_give_the_losses_of_one(tmp_path, monkeypatch):
    "Tolerance: 1e-5 relative; the sums of the gradients are added in another order, nothing else differs."
    one, two = launch(tmp_path, 1, monkeypatch), launch(tmp_path, 2, monkeypatch)
    assert set(one) == set(two) and len(one["stream"]) == 30
    for kind in one:
        np.testing.assert_allclose(two[kind], one[kind], rtol=1e-5, err_msg=kind)
    assert one["stream"][0] != one["stream"][-1]


def net(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(6, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


X, Y = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3


def test_scheduler_and_clipping_act():
    model, opt = net()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.1)
    norms = []
    for step in train(model, opt, Batches(X, Y, 10, 0), 4, settings=Training(clip=1e-3), scheduler=scheduler):
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())
    assert opt.param_groups[0]["lr"] == pytest.approx(0.001)
    assert max(norms) < 1.01e-3 and step.grad_norm > 1e-3


def test_settings_are_read_at_each_step():
    model, opt = net()
    settings = Training()
    feed = train(model, opt, Batches(X, Y, 10, 0), settings=settings)
    assert next(feed).grad_norm is None
    settings.clip = 1e-4
    next(feed)
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() < 1.01e-4


def test_bf16_differs_and_then_full_precision_comes_back():
    losses = {}
    for precision in ("no", "bf16", "no"):
        model, opt = net()
        got = [s.loss for s in train(model, opt, Batches(X, Y, 10, 0), 3, settings=Training(precision=precision))]
        losses.setdefault(precision, got)
        assert losses[precision] == got
    assert losses["no"] != losses["bf16"]
    np.testing.assert_allclose(losses["no"], losses["bf16"], rtol=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="fp16.*GPU.*bf16"):
        next(train(*net(), Batches(X, Y, 10, 0), settings=Training(precision="fp16")))


def test_an_infinite_loss_stops_before_the_step():
    model, opt = net()
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="inf at step 0 .*batch 0"):
        next(train(model, opt, Batches(X, Y, 10, 0), loss=lambda m, b: m(b[0]).sum() * float("inf")))
    assert torch.equal(before, model.weight) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("batches, message", [
    ([], "batches is empty"),
    (DataLoader(TensorDataset(X[:3], Y[:3]), batch_size=10, drop_last=True), "batches is empty"),
    (iter([(X, Y)]), "read only once"),
])
def test_bad_batches(batches, message):
    with pytest.raises((ValueError, TypeError), match=message):
        next(train(*net(), batches))


def test_bad_arguments():
    model, opt = net()
    with pytest.raises(ValueError, match="steps=-1"):
        next(train(model, opt, Batches(X, Y, 10, 0), steps=-1))
    with pytest.raises(ValueError, match="none of the model's parameters"):
        next(train(net()[0], opt, Batches(X, Y, 10, 0)))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        next(train(model, opt, Batches(X, Y, 10, 0)))


def test_a_loader_with_randomness_of_its_own_resumes():
    "Samples drawn with noise from the global generator: the skipped ones must not be counted twice."
    class Noisy(torch.utils.data.Dataset):
        def __len__(self): return 30
        def __getitem__(self, i): return X[i] + torch.rand(6), Y[i]

    from adaptive_lab.training import random_state, set_random_state
    import copy

    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    model, opt = net(1)
    for step in train(model, opt, loader, 20):
        if step.index == 10:
            kept = copy.deepcopy((model.state_dict(), opt.state_dict(), step.position, random_state()))
    straight = model.weight.detach().clone()
    model, opt = net(2)
    model.load_state_dict(kept[0]), opt.load_state_dict(kept[1]), set_random_state(kept[3])
    for step in train(model, opt, loader, 20, start=kept[2]):
        pass
    assert torch.equal(straight, model.weight)


def test_a_refused_batch_leaves_running_statistics_alone():
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    bad = X.clone()
    bad[12] = float("nan")
    feed = train(model, opt, DataLoader(TensorDataset(bad, Y), batch_size=10))
    next(feed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteLoss, match="step 1 .*after step 0"):
        next(feed)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_an_infinite_gradient_is_told_truthfully():
    "Its loss is finite, so the step is made; the next one says that the weights are lost. With clipping it is refused at once."
    def root(model, batch):
        return (model(batch[0]) * 0).abs().sum().sqrt()

    model, opt = net()
    feed = train(model, opt, Batches(X, Y, 10, 0), loss=root)
    next(feed)
    with pytest.raises(NonFiniteLoss, match="not finite any more.*checkpoint before step 1"):
        next(feed)
    model, opt = net()
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteLoss, match="gradient's norm is nan at step 0 .*no step was made"):
        next(train(model, opt, Batches(X, Y, 10, 0), loss=root, settings=Training(clip=1)))
    assert torch.equal(before, model.weight)


def test_what_does_not_fit_is_said_at_the_call():
    model, opt = net()
    with pytest.raises(TypeError, match="optimizer is a list"):
        train(model, [opt], Batches(X, Y, 10, 0))
    with pytest.raises(TypeError, match="LBFGS"):
        train(model, torch.optim.LBFGS(model.parameters()), Batches(X, Y, 10, 0))
    with pytest.raises(TypeError, match="a batch is a dict.*loss="):
        next(train(model, opt, [{"x": X, "y": Y}]))
    with pytest.raises(ValueError, match="a batch is empty"):
        next(train(model, opt, [(X[:0], Y[:0])]))


def test_a_scheduler_that_watches_the_loss():
    model, opt = net()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, threshold=10.0)
    for step in train(model, opt, Batches(X, Y, 10, 0), 4, scheduler=plateau):
        pass
    assert opt.param_groups[0]["lr"] < 0.1
