"The mechanisms in other people's training loops: each framework makes the weights that the same loop in plain PyTorch makes, and its own checkpoint goes on with the same bits."
import copy
import io
import logging
import pickle
import re
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from adaptive_lab.controller import AdaptiveTransformer
from adaptive_lab.controller.controlled_adam import Headed, Heads
from adaptive_lab.data.digits import digit_arrays
from adaptive_lab.data.streams import Windows
from adaptive_lab.data.text import stdlib_bytes
from adaptive_lab.hakmem.optimizer import HAKMEMEnhancedSGD
from adaptive_lab.hakmem.rate import Rate, Rated
from adaptive_lab.mechanisms import Composed
from adaptive_lab.plasticity import SelectivePlasticityOptimizer
from adaptive_lab.valued_adam import ValuedAdam, VWPRAdam
from adaptive_lab.vwpr import EnhancedVWPRWrapper
from adaptive_lab.wrapped import packed, unpacked

X, y, X_test, y_test = digit_arrays()
N, BATCH = 320, 32
ROWS = [torch.arange(i, i + BATCH) for i in range(0, N, BATCH)]  # an epoch


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def plasticity(model):
    optimizer = SelectivePlasticityOptimizer(model.parameters(), lr=0.01, plasticity_k=2, warmup_steps=3, coincidence=10.0, slow=0.1, keep=True, detect=True)
    optimizer.attach(model, every=3)
    return optimizer


def rated(model):
    adam = torch.optim.Adam(model.parameters(), lr=0.01)
    return Composed(adam, {"rate": Rated(Rate(), adam)})


def valued(granularity):
    return lambda model: ValuedAdam(VWPRAdam(lr=0.01, granularity=granularity), model, **{f"{kind}s": n for kind, n in SIZES.items() if kind in granularity})


SIZES = dict(sample=N, feature=64, output=10)
MAKERS = dict(plasticity=plasticity, hakmem=lambda model: HAKMEMEnhancedSGD(model.parameters(), lr=0.01), rate=rated, samples=valued("sample"), all_values=valued("feature+output+sample"))
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def bits(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def loss_of(optimizer, model, x, labels, rows):
    if not isinstance(optimizer, ValuedAdam):
        return cross_entropy(model(x), labels)
    optimizer.meet([rows])
    return optimizer.loss(model, (x, labels))


def step(model, optimizer, rows, clip=1.0):
    "One step of a plain loop."
    optimizer.zero_grad()
    loss = loss_of(optimizer, model, X[rows], y[rows], rows)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    getattr(optimizer, "set_current_loss", lambda loss: None)(loss)
    optimizer.step()


def end_task(optimizer):
    getattr(optimizer, "consolidate", lambda: None)()


def plain(make, epochs=4, ends=2):
    "The loop that the frameworks are compared with: a cosine by epochs, a task that ends after two of them."
    model = mlp()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for epoch in range(epochs):
        for rows in ROWS:
            step(model, optimizer, rows)
        if epoch + 1 == ends:
            end_task(optimizer)
        scheduler.step()
    return model, optimizer, scheduler


# plain PyTorch


@makers
def test_a_file_of_states_goes_on_with_the_same_bits(make):
    whole, (model, optimizer, scheduler), file = plain(make)[0], plain(make, 2), io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
    file.seek(0)
    again = mlp(1)
    other = make(again)
    parts = again, other, torch.optim.lr_scheduler.CosineAnnealingLR(other, 10)
    for part, state in zip(parts, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    for _ in range(2):
        for rows in ROWS:
            step(again, other, rows)
        parts[2].step()
    assert torch.equal(bits(again), bits(whole))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [MAKERS[name] for name in ("hakmem", "rate", "samples")], ids=["hakmem", "rate", "samples"])
def test_a_copy_of_what_a_scheduler_turns_is_a_pair_of_its_own(make, copied):
    model, optimizer, _ = plain(make, 1)
    twin, other = copied((model, optimizer))
    before = bits(model)
    for rows in ROWS[:3]:
        step(twin, other, rows)
    assert torch.equal(bits(model), before) and not torch.equal(bits(twin), before)
    for rows in ROWS[:3]:
        step(model, optimizer, rows)
    assert torch.equal(bits(model), bits(twin))


def test_a_state_saved_while_the_averages_are_in_gives_back_what_was_there():
    model, optimizer, _ = plain(MAKERS["hakmem"], 1)
    before = bits(model)
    optimizer.eval()
    again = mlp()
    again.load_state_dict(model.state_dict())
    other = MAKERS["hakmem"](again)
    other.load_state_dict(optimizer.state_dict())
    assert other.swapped and torch.equal(bits(again), bits(model)) and not torch.equal(bits(again), before)
    with pytest.raises(RuntimeError, match="call train"):
        step(again, other, ROWS[0])
    copied, third = pickle.loads(pickle.dumps((again, other)))
    for m, o in ((again, other), (copied, third)):
        o.train()
        assert torch.equal(bits(m), before) and not o.swapped


@pytest.mark.parametrize("granularity", SIZES)
def test_values_do_not_mind_that_gradients_are_forgotten_after_the_forward(granularity):
    model = mlp()
    optimizer = valued(granularity)(model)
    for rows in ROWS * 2:
        loss = loss_of(optimizer, model, X[rows], y[rows], rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    twin = mlp()
    other = valued(granularity)(twin)
    for rows in ROWS * 2:
        step(twin, other, rows, clip=1e9)
    assert torch.equal(bits(model), bits(twin)) and torch.equal(*(next(iter(o.wrapper.phi_values().values())) for o in (optimizer, other)))


def test_batches_that_were_measured_or_left_out_teach_the_values_nothing():
    phi = []
    for extra in (False, True):
        model = mlp()
        optimizer = valued("sample")(model)
        for rows in ROWS:
            if extra:
                with torch.no_grad():
                    loss_of(optimizer, model, X[:BATCH], y[:BATCH], torch.arange(BATCH))  # measured
                loss_of(optimizer, model, X[:BATCH] * 9, y[:BATCH], torch.arange(BATCH))  # left out
            step(model, optimizer, rows)
        phi.append(optimizer.wrapper.phi_values()["samples"])
    assert torch.equal(*phi)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="losses are not known"):
        optimizer.step()


def test_a_loss_with_its_graph_is_told_without_a_warning(recwarn):
    model = mlp()
    optimizer = rated(model)
    step(model, optimizer, ROWS[0])
    assert not recwarn.list


def test_the_state_of_a_wrapped_model_is_tensors_alone():
    st = pytest.importorskip("safetensors.torch")
    trained, other, third = (EnhancedVWPRWrapper(mlp(), granularity="unit", signal="rarity") for _ in range(3))
    theta, phi = torch.optim.SGD(trained.base_model.parameters(), 0.1), torch.optim.SGD(trained.phi_params(), 0.1)
    for rows in ROWS[:3]:
        trained.apply_vwpr_step(cross_entropy(trained(X[rows]), y[rows]), theta, phi)
    other.load_state_dict(st.load(st.save(trained.state_dict())))
    assert other.steps == 3 and str(other.signal_state()) == str(trained.signal_state())
    older = trained.state_dict() | dict(_extra_state=trained.signal_state())  # as it was saved before
    third.load_state_dict(older)
    assert third.steps == 3 and str(third.signal_state()) == str(trained.signal_state())


def test_what_is_packed_is_data_and_never_code():
    assert unpacked(packed({"a": [1, 2.5, "b", None]})) == {"a": [1, 2.5, "b", None]}
    file = io.BytesIO()
    torch.save(print, file)
    with pytest.raises(pickle.UnpicklingError):
        unpacked(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))


# PyTorch Lightning


QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)


def lightning():
    L = pytest.importorskip("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return L


def fitted(folder, make, epochs=4, checkpoint=None, ends=2, **more):
    "The loop of `plain` as Lightning runs it: module and trainer."
    L = lightning()

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, i):
            return loss_of(self.trainer.optimizers[0], self.net, *batch)

        def configure_optimizers(self):
            optimizer = make(self.net)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]

        def train_dataloader(self):
            return DataLoader(TensorDataset(X[:N], y[:N], torch.arange(N)), BATCH)

        def on_train_epoch_end(self):
            if self.current_epoch + 1 == ends:
                end_task(self.optimizers())  # Lightning's wrapper of it

    module, trainer = Module(), L.Trainer(max_epochs=epochs, gradient_clip_val=1.0, default_root_dir=folder, **QUIET, **more)
    trainer.fit(module, ckpt_path=checkpoint)
    return module, trainer


@pytest.mark.filterwarnings("ignore")
@makers
def test_lightning_makes_the_same_weights_and_goes_on_from_its_checkpoint(make, tmp_path):
    whole, trainer = fitted(tmp_path, make)
    model, optimizer, _ = plain(make)
    assert torch.equal(bits(whole.net), bits(model))
    if make is plasticity:
        assert trainer.optimizers[0].watched.tasks == optimizer.watched.tasks >= 1
    half, trainer = fitted(tmp_path, make, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fitted(tmp_path, make, checkpoint=tmp_path / "half.ckpt")
    assert torch.equal(bits(resumed.net), bits(whole.net))


def test_lightnings_wrapper_and_the_optimizer_remember_the_same():
    lightning()
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = mlp()
    inner = SelectivePlasticityOptimizer(model.parameters(), coincidence=10.0)
    outer = LightningOptimizer(inner)
    outer.attach(model, every=1)
    assert inner.watched is outer.watched and inner.model is model
    step(model, inner, ROWS[0])
    outer.consolidate()
    assert inner.watched.tasks == 1 and "watched" in outer.state_dict()
    outer.detach()
    assert inner.watched is inner.model is None

    inner = HAKMEMEnhancedSGD(model.parameters())
    outer = LightningOptimizer(inner)
    for rows in ROWS[:3]:
        step(model, inner, rows)
    outer.state_dict()
    outer.set_current_loss(1.5)
    assert inner._told == [1.5]
    before = bits(model)
    outer.eval()
    assert inner.swapped and "held" in inner.state_dict()
    inner.train()
    assert not outer.swapped and torch.equal(bits(model), before)

    outer = LightningOptimizer(rated(model))
    outer.set_current_loss(torch.tensor(2.0))
    assert outer.optimizer.told == 2.0


@pytest.mark.filterwarnings("ignore")
def test_a_controller_of_heads_hears_lightnings_losses(tmp_path):
    L = lightning()
    text, held_out = Windows(stdlib_bytes(20_000), 16, 8, seed=0), Windows(stdlib_bytes(20_000, validation=True), 16, 8, seed=1)[0]

    def controlled(model):
        return Composed(torch.optim.Adam(model.parameters(), 0.003), {"heads": Headed(Heads(every=4, budget=0.5, efficiency_factor=0.3), model, held_out)})

    def transformer():
        torch.manual_seed(0)
        return AdaptiveTransformer(num_layers=1, num_heads=4, dim=16, context=16)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = transformer()

        def training_step(self, batch, i):
            return cross_entropy(self.net(batch[0]).flatten(0, -2), batch[1].flatten())

        def configure_optimizers(self):
            return controlled(self.net)

    def fit(steps, checkpoint=None):
        module = Module()
        trainer = L.Trainer(max_epochs=steps // 8, default_root_dir=tmp_path, **QUIET)
        trainer.fit(module, DataLoader([text[i] for i in range(8)], batch_size=None), ckpt_path=checkpoint)
        return module, trainer

    whole, trainer = fit(16)
    model = transformer()
    optimizer = controlled(model)
    for i in [*range(8)] * 2:
        optimizer.zero_grad()
        loss = cross_entropy(model(text[i][0]).flatten(0, -2), text[i][1].flatten())
        loss.backward()
        optimizer.set_current_loss(loss)
        optimizer.step()
    assert torch.equal(bits(whole.net), bits(model)) and torch.equal(whole.net.gate_heads, model.gate_heads) and (model.gate_heads == 0).any()
    assert len(trainer.optimizers[0].mechanisms["heads"].controller.decisions) == 4
    _, trainer = fit(8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.equal(bits(fit(16, tmp_path / "half.ckpt")[0].net), bits(whole.net))


# Hugging Face Trainer


class Labelled(nn.Module):
    "A model as the Trainer likes it: it gives its loss."

    def __init__(self, net=None):
        super().__init__()
        self.net = net or mlp()

    def forward(self, x, labels=None, index=None, **kwargs):
        z = self.net(x)
        return dict(loss=cross_entropy(z, labels), logits=z)


def hugging(folder, model, optimizer, **more):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()

    class Told(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            inner = getattr(self.optimizer, "optimizer", None)
            if not isinstance(inner, ValuedAdam):
                return super().compute_loss(model, inputs, return_outputs, **kwargs)
            loss = loss_of(inner, model.net, inputs["x"], inputs["labels"], inputs["index"])
            return (loss, dict(loss=loss, logits=model.net(inputs["x"]))) if return_outputs else loss

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            getattr(self.optimizer.optimizer, "set_current_loss", lambda loss: None)(loss)
            return loss

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [dict(x=X[i], labels=y[i], index=i) for i in range(N)]
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", dataloader_pin_memory=False, remove_unused_columns=False, save_strategy="no")
    how = dict(num_train_epochs=2, per_device_train_batch_size=BATCH, lr_scheduler_type="constant", max_grad_norm=1.0)
    trainer = Told(model, transformers.TrainingArguments(str(folder), **quiet | how | more), train_dataset=rows, eval_dataset=rows[:BATCH], optimizers=(optimizer, None))
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


@makers
def test_the_trainer_makes_the_same_weights_and_goes_on_from_its_checkpoint(make, tmp_path):
    "It evaluates in the middle of an epoch and at its end, which the plain loop does not, and saves right after: while averages are in the model."
    transformers = pytest.importorskip("transformers")
    often = dict(save_strategy="steps", save_steps=10, eval_strategy="steps", eval_steps=5, lr_scheduler_type="cosine")
    whole, resumed, model = Labelled(), Labelled(), mlp()
    hugging(tmp_path, whole, make(whole.net), **often).train()
    optimizer = make(model)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 2 * len(ROWS))
    for rows in ROWS * 2:
        step(model, optimizer, rows)
        scheduler.step()
    getattr(optimizer, "eval", lambda: None)()  # as the last evaluation leaves it
    assert torch.equal(bits(whole), bits(model))
    hugging(tmp_path, resumed, make(resumed.net), **often).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert torch.equal(bits(resumed), bits(whole))


def test_the_trainer_saves_a_wrapped_model(tmp_path):
    wrapper = EnhancedVWPRWrapper(Labelled(), granularity="sample", samples=N)
    trainer = hugging(tmp_path, wrapper, torch.optim.Adam(wrapper.base_model.parameters()), save_strategy="steps", save_steps=10)
    trainer.train()
    resumed = EnhancedVWPRWrapper(Labelled(), granularity="sample", samples=N)
    hugging(tmp_path, resumed, torch.optim.Adam(resumed.base_model.parameters())).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert torch.equal(bits(resumed), bits(wrapper))


# skorch and the tutorial


def estimator(optimizer, **more):
    skorch = pytest.importorskip("skorch")
    common = dict(criterion=nn.CrossEntropyLoss, lr=0.01, max_epochs=3, batch_size=BATCH, train_split=None, verbose=0)
    return skorch.NeuralNetClassifier(Digits, optimizer=optimizer, **common | more)


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return self.net(x)


KNOBS = {SelectivePlasticityOptimizer: dict(plasticity_k=2.0, warmup_steps=3, slow=0.1, keep=True), HAKMEMEnhancedSGD: dict(seed=3)}
kinds = pytest.mark.parametrize("kind", KNOBS, ids=lambda k: k.__name__)


@kinds
def test_skorch_makes_the_same_weights_and_goes_on_from_its_files(kind, tmp_path):
    make = lambda: estimator(kind, **{f"optimizer__{name}": value for name, value in KNOBS[kind].items()})
    net, data = make(), (X[:N].numpy(), y[:N].numpy())
    net.fit(*data)
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.01, **KNOBS[kind])
    for rows in ROWS * 3:
        step(model, optimizer, rows, clip=1e9)
    assert torch.equal(bits(net.module_), bits(model))
    names = dict(f_params=tmp_path / "p", f_optimizer=tmp_path / "o")
    net.save_params(**names)
    other = make().initialize()
    other.load_params(**names)
    pickled = pickle.loads(pickle.dumps(net.set_params(torch_load_kwargs=dict(weights_only=False))))
    for e in (net, other, pickled):
        e.partial_fit(*data)
    assert torch.equal(bits(net.module_), bits(other.module_)) and torch.equal(bits(net.module_), bits(pickled.module_))


def test_knobs_are_searched_in_a_pipeline_and_turned_while_it_lives():
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    net = estimator(SelectivePlasticityOptimizer, optimizer__warmup_steps=3, max_epochs=2)
    search = GridSearchCV(Pipeline([("scale", StandardScaler()), ("net", net)]), {"net__optimizer__plasticity_k": [0.0, 20.0]}, cv=2, error_score="raise")
    search.fit(X[:N].numpy(), y[:N].numpy())
    assert len(set(search.cv_results_["mean_test_score"])) == 2  # the knob arrived
    best = search.best_estimator_.named_steps["net"]
    best.set_params(optimizer__plasticity_k=3.0)
    assert best.optimizer_.param_groups[0]["plasticity_k"] == 3.0
    wrong = Pipeline([("net", estimator(SelectivePlasticityOptimizer, optimizer__plasticity_k=-1.0))])
    with pytest.raises(ValueError, match="plasticity_k"):
        wrong.fit(X[:N].numpy(), y[:N].numpy())


BLOCKS = ("plain", "lightning", "trainer", "skorch")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", BLOCKS)
def test_the_short_blocks_of_the_tutorial_run_as_they_stand(which, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Lightning writes
    nb = nbformat.read(Path(__file__).parent.parent / "nbs" / "tutorials" / "elsewhere.ipynb", as_version=4)
    (cell,) = (c.source for c in nb.cells if c.source.startswith("## In other frameworks"))
    blocks = dict(zip(BLOCKS, re.findall(r"```python\n(.*?)```", cell, flags=re.S), strict=True))
    assert all(block.count("\n") <= 12 for block in blocks.values())
    names = dict(SelectivePlasticityOptimizer=SelectivePlasticityOptimizer, HAKMEMEnhancedSGD=HAKMEMEnhancedSGD, cross_entropy=cross_entropy, nn=nn, folder=str(tmp_path))
    exec(blocks[which], names | GIVEN[which]())


def given_lightning():
    L = lightning()

    class YourModule(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, i):
            return cross_entropy(self.net(batch[0]), batch[1])

        def train_dataloader(self):
            return DataLoader(TensorDataset(X[:N], y[:N]), BATCH)

    return dict(L=L, YourModule=YourModule)


def given_trainer():
    transformers = pytest.importorskip("transformers")
    dataset = [dict(x=X[i], labels=y[i]) for i in range(BATCH)]
    return dict(Trainer=transformers.Trainer, TrainingArguments=transformers.TrainingArguments, model=Labelled(), dataset=dataset)


def given_skorch():
    from sklearn.model_selection import GridSearchCV

    skorch = pytest.importorskip("skorch")
    return dict(NeuralNetClassifier=skorch.NeuralNetClassifier, GridSearchCV=GridSearchCV, Module=Digits, X=X[:N].numpy(), y=y[:N].numpy())


GIVEN = dict(plain=lambda: dict(model=mlp(), tasks=[[(X[rows], y[rows]) for rows in ROWS]] * 2), lightning=given_lightning, trainer=given_trainer, skorch=given_skorch)
