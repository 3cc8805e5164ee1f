"Zoos, evaluators, layouts and populations: what the notebooks do not show."
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.epsilon_vae.population import metric_matrix, populations
from adaptive_lab.epsilon_vae.weights import flatten, layout_of, model_state, unflatten
from adaptive_lab.evaluator import Evaluator, Unfit, evaluator_of, load_strictly, scores
from adaptive_lab.run import weights_digest
from adaptive_lab.store import Store
from adaptive_lab.zoo import Zoo, grow, grow_run, moments, recipe_of, run_name


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder, settings = tmp_path_factory.mktemp("zoo"), Zoo(runs=3, steps=60, width=8)
    grow(folder, settings, many=3, workers=1, progress=False)
    return folder, settings


def test_the_same_zoo_in_another_process_is_the_same_to_the_bit(zoo, tmp_path):
    folder, settings = zoo
    grow(tmp_path, settings, many=3, workers=2, progress=False)
    a, b = ([(c.run, c.step, c.hash, c.metrics) for c in Store(f).checkpoints()] for f in (folder, tmp_path))
    assert a == b and len(a) == 9


def test_a_zoo_goes_on_where_it_was(zoo, tmp_path):
    _, settings = zoo
    name, recipe = run_name(settings, 0), recipe_of(settings, 0)
    assert grow_run(tmp_path, name, recipe, 3) == 3
    Store(tmp_path).delete(name, 60)
    assert grow_run(tmp_path, name, recipe, 3) == 3 and grow_run(tmp_path, name, recipe, 3) == 0


def test_recipes_differ_and_are_plain_data():
    draws = [recipe_of(Zoo(), i) for i in range(20)]
    assert json.loads(json.dumps(draws)) == draws and len({d["knobs"]["optimizer.lr"] for d in draws}) == 20
    assert 0 < sum(d["knobs"]["data.noise"] > 0 for d in draws) < 20
    assert recipe_of(Zoo(seed=1), 0) != draws[0]


def test_too_few_steps_for_the_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="many=16.*steps=10"):
        grow(tmp_path, Zoo(runs=1, steps=10))
    assert moments(16, 4) == [1, 4, 9, 16]


def test_probes_are_in_no_run_s_training_or_test(zoo):
    folder, settings = zoo
    judge = evaluator_of(recipe_of(settings, 0))
    seen = {tuple(x) for x in judge.probes.tolist()}
    assert not any(tuple(x) in seen for x in judge.tests["test"][0].tolist())
    assert judge.metrics(populations(folder)[0].state(0))["accuracy"] == pytest.approx(populations(folder)[0].rows[0].metrics["accuracy"])


def test_weights_that_do_not_fit_leave_the_model_as_it_was():
    net = nn.Linear(3, 2)
    before = weights_digest(net)
    for state, word in (({}, "missing: weight, bias"), ({**net.state_dict(), "x": torch.ones(1)}, "not in the model: x"), ({"weight": torch.ones(3, 3), "bias": torch.ones(2)}, "another shape")):
        with pytest.raises(Unfit, match=word):
            load_strictly(net, state)
    assert weights_digest(net) == before


def test_the_evaluator_does_not_keep_what_it_was_given_last():
    net = nn.Linear(3, 2)
    judge = Evaluator(lambda: nn.Linear(3, 2), torch.eye(3), {"test": (torch.eye(3), torch.tensor([0, 1, 0]))})
    a = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, 0.0])}
    first = judge.outputs(a)
    judge.outputs(net.state_dict())
    assert torch.equal(judge.outputs(a), first) and torch.equal(a["weight"], torch.ones(2, 3))
    assert judge.metrics(a)["accuracy"] == pytest.approx(2 / 3)


def test_scores_of_certain_and_wrong_answers():
    sure = scores(torch.tensor([[1e4, 0.0]]), torch.tensor([1]))
    assert sure == dict(accuracy=0.0, loss=1e4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_vectors_there_and_back_in_every_type(dtype):
    state = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2)).to(dtype).state_dict()
    layout = layout_of(state)
    assert [s.kind for s in layout.slots] == ["kernel", "bias", "scale", "bias", "matrix", "bias"]
    back = unflatten(layout, flatten(layout, state), state)
    assert list(back) == list(state) and all(torch.equal(back[n], state[n]) and back[n].dtype == state[n].dtype for n in state)
    assert not any(back[n].data_ptr() == state[n].data_ptr() for n in state)


def test_bad_vectors_and_states():
    state = nn.Linear(3, 2).state_dict()
    layout = layout_of(state)
    with pytest.raises(ValueError, match=r"shape \(7,\).*8 numbers"):
        unflatten(layout, torch.zeros(7), state)
    with pytest.raises(ValueError, match="mine is of another architecture: bias is missing"):
        flatten(layout, {"weight": state["weight"]}, "mine")
    with pytest.raises(ValueError, match="nothing in this state is learnt"):
        layout_of({"n": torch.tensor(3)})
    for bad in ([], 3, {"a": {"b": torch.ones(1)}}, {}):
        with pytest.raises(ValueError, match="no state dict"):
            model_state(bad)


def test_missing_metrics_are_never_zero():
    rows = [dict(a=1.0, b="x"), dict(a=None), None, dict(a=True, c=[1]), dict(a=float("inf"))]
    matrix, names = metric_matrix(rows)
    assert names == ["a"] and matrix[0, 0] == 1 and np.isnan(matrix[1:]).all()
    with pytest.raises(ValueError, match="metric 'z'.*there is a"):
        metric_matrix(rows, ["z"])


def test_one_broken_file_costs_itself_only(zoo, tmp_path):
    _, settings = zoo
    grow(tmp_path, settings, many=3, workers=1, progress=False)
    store = Store(tmp_path)
    row = store.checkpoints()[0]
    path = store._object(row.hash)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(populations(tmp_path)[0]) == 8
    assert row.run in str(told[0].message)


def test_an_empty_store_and_a_checkpoint_without_recipe(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to learn from"):
        populations(tmp_path)
    Store(tmp_path).save("a", 1, nn.Linear(2, 2).state_dict())
    found = populations(tmp_path)[0]
    assert len(found) == 1
    with pytest.raises(ValueError, match="has no recipe"):
        found.evaluator()
    with pytest.raises(ValueError, match="there is 1 run"):
        found.split()
