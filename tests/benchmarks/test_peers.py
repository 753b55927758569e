"""What is read of peers' programs and of our own run folders, and what they are given to read."""

import pytest

from benchmarks import nanogpt, ours
from benchmarks.nanogpt import NanoGPT, PeerError, iteration_seconds
from benchmarks.suite import QUICK, WORD, WORDS, Settings
from benchmarks.time_to_loss import claims
from benchmarks.wlm import WordLanguageModel, write_texts
from lm.config import CorpusConfig, Section
from lm.corpora import open_corpus, prepare

PRINTED = """\
step 0: train loss 4.2, val loss 4.2
iter 0: loss 4.2161, time 900.00ms, mfu -100.00%
iter 1: loss 4.1, time 30.00ms, mfu -100.00%
iter 2: loss 4.0, time 1,000.00ms, mfu 0.10%
step 3: train loss 3.9, val loss 3.9
saving checkpoint to out
iter 3: loss 3.9, time 800.00ms, mfu 0.10%
iter 4: loss 3.8, time 50.00ms, mfu 0.10%
"""


def test_an_iteration_with_an_evaluation_is_given_the_time_of_a_usual_one():
    assert iteration_seconds(PRINTED.splitlines(), 3) == pytest.approx([0.05, 0.03, 1.0, 0.05, 0.05])


def test_a_lines_own_validation_is_no_training_time():
    rows = [
        {"step": 10, "seconds": 1.0, "valid_loss": None},
        {"step": 20, "seconds": 2.2, "valid_loss": None},
        {"step": 25, "seconds": 9.0, "valid_loss": 2.0},
    ]
    # 0.1 and 0.12 seconds a step: five more steps take 0.6.
    assert ours.seconds_at(rows) == pytest.approx({10: 1.0, 20: 2.2, 25: 2.8})


def test_a_run_that_counted_has_no_training_time():
    assert ours.seconds_at([{"step": 1, "train_loss": None, "valid_loss": 1.69}]) == {1: 0.0}


def test_the_slowest_seed_decides():
    training, whole = claims([1.0, 4.0], [10.0, 8.0], {"loss": 1.9, "seconds": 100.0, "whole": 120.0}, full=True)
    assert (training.value, whole.value, training.why) == (25.0, 12.0, "")


def test_a_seed_that_never_gets_there_misses_the_target():
    training, whole = claims([1.0, None], [10.0, 8.0], {"loss": 1.9, "seconds": 100.0, "whole": 120.0}, full=True)
    assert (training.value, whole.value) == (0.0, 0.0)
    assert training.why == "1 of 2 seeds did not reach 1.9000"


def test_without_the_peer_nothing_is_claimed():
    assert [each.value for each in claims([1.0], [10.0], {"loss": 1.9}, full=True)] == [None, None]


def test_the_options_of_the_suites_are_options_of_lm_train():
    assert ours.lacks(QUICK) is None
    assert ours.lacks("--preset no-such") == "no-such"
    model = ours.config(WORD, WORDS).model.resolve("model")
    assert (model.type, model.hidden_size, model.embedding_size, model.num_layers) == ("lstm", 200, 200, 2)


# -- clones ------------------------------------------------------------------------------------------


def test_a_path_that_is_no_clone_is_refused_with_what_it_lacks(tmp_path):
    corpus = open_corpus(CorpusConfig(source=str(text_file(tmp_path))))
    prepared = prepare(corpus, Section(type="char"))
    with pytest.raises(PeerError, match=r"there is no train\.py; give the path of a clone of nanoGPT"):
        NanoGPT(tmp_path, tmp_path, corpus, prepared, Settings())
    with pytest.raises(PeerError, match=r"there is no main\.py"):
        WordLanguageModel(tmp_path, tmp_path, Settings())


def text_file(folder):
    path = folder / "input.txt"
    path.write_text("the cat sat on the mat, and the dog ran.\n" * 200, "utf-8")
    return path


TRAIN = """
import os, sys, torch
from model import GPT, GPTConfig
options = dict(each[2:].split("=") for each in sys.argv[1:] if each.startswith("--"))
iterations, every = int(options["max_iters"]), int(options["eval_interval"])
arguments = {"block_size": 16, "vocab_size": 16}
model = GPT(GPTConfig(**arguments))
os.makedirs(options["out_dir"], exist_ok=True)
for step in range(iterations + 1):
    if step and step % every == 0:
        torch.save({"model": model.state_dict(), "model_args": arguments}, options["out_dir"] + "/ckpt.pt")
    print(f"iter {step}: loss 1.0, time 10.00ms, mfu 0.00%", flush=True)
"""
MODEL = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(config.vocab_size))
        print("number of parameters")

    def forward(self, ids, targets=None):
        return self.scores.expand(*ids.shape, -1), None
"""
PREPARE = """
import os
import numpy as np
folder = os.path.dirname(__file__)
text = open(os.path.join(folder, "input.txt")).read()
chars = sorted(set(text))
ids = np.array([chars.index(each) for each in text], dtype=np.uint16)
ids[int(len(ids) * 0.9):].tofile(os.path.join(folder, "val.bin"))
"""


@pytest.mark.slow
def test_a_clone_is_copied_prepared_trained_and_scored_and_stays_as_it_was(tmp_path):
    clone = tmp_path / "clone"
    (clone / nanogpt.DATA).mkdir(parents=True)
    (clone / "config").mkdir()
    files = {"train.py": TRAIN, "model.py": MODEL, nanogpt.CONFIG: "", f"{nanogpt.DATA}/prepare.py": PREPARE}
    for name, content in files.items():
        (clone / name).write_text(content, "utf-8")
    before = sorted(clone.rglob("*"))
    text = text_file(tmp_path)
    corpus = open_corpus(CorpusConfig(source=str(text), split_fractions=(0.9, 0.1)))
    prepared = prepare(corpus, Section(type="char"))
    assert len(set(text.read_text("utf-8"))) == 16
    peer = NanoGPT(clone, tmp_path / "work", corpus, prepared, Settings(threads=1))
    trained = peer.train("a", 40, points=2)
    assert [point.step for point in trained.points] == [20, 40]
    assert [point.seconds for point in trained.points] == pytest.approx([0.2, 0.4])
    assert trained.tokens_per_second == pytest.approx(nanogpt.TOKENS_PER_STEP / 0.01)
    scores = peer.score(trained.points[-1].path)
    # All 16 characters are equally likely.
    assert scores.loss == pytest.approx(2.7725887, abs=1e-6)
    assert (scores.tokens, scores.context) == (820, "sliding window of 16 tokens, stride 8")
    assert sorted(clone.rglob("*")) == before


def test_the_word_examples_text_ends_every_line_and_has_no_word_that_training_lacks(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.txt").write_text("the cat sat\nthe dog ran\nmore words here", "utf-8")
    (folder / "valid.txt").write_text("the cat ran\na dog sat\n", "utf-8")
    corpus = open_corpus(CorpusConfig(source=str(folder)))
    texts = write_texts(corpus, tmp_path / "out", train_words=5)
    assert (texts / "train.txt").read_text("utf-8") == "the cat sat\nthe dog ran\n"
    assert (texts / "valid.txt").read_text("utf-8") == "the cat ran\n<unk> dog sat\n"
    assert (texts / "test.txt").read_bytes() == (texts / "valid.txt").read_bytes()
