"adaptive-lab train-bytes in one process and in two: the same losses; a killed worker and a restart end in the same bits."
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import ranks

from adaptive_lab.bytropix.generation import load_model
from adaptive_lab.data.text import stdlib_bytes
from adaptive_lab.run import Run, weights_digest
from adaptive_lab.store import Store
from adaptive_lab.train_bytes import train_bytes

SMALL = "--preset small --local_hidden_size 16 --decoder_memory_dim 16 --hyperbolic_dims 8 8 4 --context_window 48 --attention_span 0 --batch_size 4 --eval_every 6 --no_amp --no_pictures --quiet".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(stdlib_bytes(20_000)))
    return path


TRAIN = ["-m", "adaptive_lab.cli", "train-bytes", *SMALL]


def launched(*flags):
    "In two processes, by torchrun."
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    done = subprocess.run([sys.executable, *launcher, *TRAIN, *map(str, flags)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def pair(*flags):
    return ranks.begin(*TRAIN, *flags)


def of(folder) -> Run:
    return Run.resume(Store(folder), "bytes")


def test_two_processes_make_the_losses_of_one_and_a_restart_the_same_bits(text, tmp_path):
    "The sums of the gradients are added in another order, nothing else differs; in two processes, stopped and gone on, every bit is that of two that were not stopped."
    launched("--data_path", text, "--checkpoint_dir", tmp_path / "two", "--steps", 12)
    assert train_bytes([*SMALL, "--data_path", str(text), "--checkpoint_dir", str(tmp_path / "one"), "--steps", "12"]) == 0
    one, two = of(tmp_path / "one"), of(tmp_path / "two")
    assert len(one.losses) == 12 and one.losses[0] != one.losses[-1]
    np.testing.assert_allclose(two.losses, one.losses, rtol=2e-5)

    both = pair("--data_path", text, "--checkpoint_dir", tmp_path / "killed", "--steps", 12, "--save-every", 4)
    end = time.time() + 240
    store = Store(tmp_path / "killed")
    while not store.checkpoints("bytes"):
        assert time.time() < end and all(p.poll() is None for p in both)
        time.sleep(0.01)
    for p in both:
        p.kill()
    for p in both:
        p.wait()
    assert 4 <= max(c.step for c in store.checkpoints("bytes")) < 12, "too late: it had ended"
    assert [p.wait(timeout=240) for p in pair("--checkpoint_dir", tmp_path / "killed", "--resume")] == [0, 0]
    again = of(tmp_path / "killed")
    assert again.index == 12 and again.losses == two.losses and weights_digest(again.model) == weights_digest(two.model)


@pytest.mark.parametrize("flags, said", [
    (["--hyperbolic_dims", "8", "4"], "num_levels=3 needs 3"),
    (["--rotation_types", "so_n", "spin"], "rotation_types"),
    (["--local_hidden_size", "15"], "num_encoder_heads"),
    (["--dropout", "1.5"], "dropout"),
    (["--data_path", "absent.txt"], "absent.txt"),
    (["--experts", "o3", "q9"], "q9"),
    (["--learning_rate", "-1"], "learning_rate"),
    (["--learning_rate", "-1", "--disable_q_controller"], "learning_rate=-1.0"),
    (["--q_discount", "1"], "q_discount"),
])
def test_a_flag_that_cannot_be_is_refused_by_name(text, tmp_path, capsys, flags, said):
    from adaptive_lab.cli import main

    given = ["train-bytes", *SMALL, "--data_path", str(text), "--checkpoint_dir", str(tmp_path / "out"), *flags]
    assert main(given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out" / "records").exists() or not list((tmp_path / "out" / "records").iterdir())


def test_a_name_that_is_taken_is_not_overwritten_unasked(text, tmp_path, capsys):
    from adaptive_lab.cli import main

    given = ["train-bytes", *SMALL, "--data_path", str(text), "--checkpoint_dir", str(tmp_path), "--steps", "2"]
    assert main(given) == 0
    before = weights_digest(of(tmp_path).model)
    assert main(given) == 2 and "bytes" in capsys.readouterr().err
    assert weights_digest(of(tmp_path).model) == before
    assert main([*given, "--overwrite", "--seed", "7"]) == 0
    assert weights_digest(of(tmp_path).model) != before


def test_resume_goes_on_for_longer_and_refuses_what_the_checkpoint_does_not_say(text, tmp_path, capsys, monkeypatch):
    here = [*SMALL, "--data_path", os.path.relpath(text), "--checkpoint_dir", str(tmp_path / "out")]
    assert train_bytes([*here, "--steps", "2"]) == 0
    monkeypatch.chdir(tmp_path)  # the text is found from another folder, too
    assert train_bytes(["--checkpoint_dir", "out", "--resume", "--steps", "3", "--quiet", "--no_pictures"]) == 0
    assert train_bytes([*SMALL, "--data_path", str(text), "--checkpoint_dir", "out", "--resume", "--steps", "4"]) == 0
    assert of("out").index == 4
    for flags, said in (
        (["--resume", *SMALL, "--data_path", str(text), "--local_hidden_size", "32"], "local_hidden_size=16, not 32"),
        (["--resume", *SMALL, "--data_path", str(text), "--disable_q_controller"], "begun with other flags"),
        (["--resume", "--overwrite"], "give one of them"),
    ):
        with pytest.raises(ValueError, match=said):
            train_bytes([*flags, "--checkpoint_dir", "out"])
    assert of("out").index == 4

    store = Store("out")  # a newest checkpoint that is damaged: both commands name the one before
    newest = store._object(store.checkpoints("bytes")[-1].hash)
    damaged = bytearray(newest.read_bytes())
    damaged[-100] ^= 1
    newest.chmod(0o644)
    newest.write_bytes(damaged)
    assert store.whole("bytes") == [2, 3]
    with pytest.raises(ValueError, match="--step 3"):
        train_bytes(["--resume", "--checkpoint_dir", "out"])
    with pytest.raises(ValueError, match="bytes@3"):
        load_model("out")


def test_a_folder_that_cannot_be_written_is_refused_before_training(text, tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        train_bytes([*SMALL, "--data_path", str(text), "--checkpoint_dir", str(text), "--steps", "2"])
    with pytest.raises(ValueError, match="learning_rate=11.0"):
        train_bytes([*SMALL, "--data_path", str(text), "--checkpoint_dir", str(tmp_path / "out"), "--learning_rate", "11", "--disable_q_controller"])
    assert not (tmp_path / "out").exists()
