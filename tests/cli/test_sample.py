"""lm sample: the text on stdout and nothing else; the same seed, the same text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import main as program

Lm = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("runs")


def test_stdout_holds_prompt_and_text_and_stderr_the_rest(lm: Lm) -> None:
    done = lm("sample", "a", "--prompt", "the cat ", "--max-tokens", "20", "--seed", "7")
    assert done.code == 0
    assert done.out.startswith("the cat ") and len(done.out) == len("the cat ") + 20 + 1 and done.out.endswith("\n")
    assert re.fullmatch(r"a@best · seed 7 · 20 tokens, [\d,]+ tokens/s\n", done.err)
    alone = lm("sample", "a", "--prompt", "the cat ", "--max-tokens", "20", "--seed", "7", "--no-echo")
    assert alone.out == done.out.removeprefix("the cat ")


def test_the_same_seed_gives_the_same_text_and_another_another(lm: Lm) -> None:
    texts = [lm("sample", "a", "--seed", seed, "--max-tokens", "40").out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_seed_that_was_not_given_is_printed_and_repeats_the_text(lm: Lm) -> None:
    done = lm("sample", "a", "--max-tokens", "40")
    seed = re.search(r"seed (\d+)", done.err)
    assert seed is not None
    assert lm("sample", "a", "--max-tokens", "40", "--seed", seed[1]).out == done.out
    assert lm("sample", "a", "--max-tokens", "40").out != done.out


def test_each_of_several_samples_is_its_own_and_the_first_is_the_one_alone(lm: Lm) -> None:
    flags = ("--seed", "3", "--max-tokens", "15", "--json")
    alone = json.loads(lm("sample", "a", *flags).out)
    several = [json.loads(line) for line in lm("sample", "a", "-n", "3", *flags).out.splitlines()]
    assert [sample["index"] for sample in several] == [0, 1, 2]
    assert several[0] == alone
    assert len({sample["text"] for sample in several}) == 3


def test_temperature_zero_needs_no_luck(lm: Lm) -> None:
    texts = {lm("sample", "a", "--temperature", "0", "--seed", seed, "--max-tokens", "20").out for seed in "123"}
    assert len(texts) == 1
    assert lm("sample", "a", "--top-k", "1", "--seed", "9", "--max-tokens", "20").out in texts


def test_a_prompt_from_stdin_loses_its_last_newline_alone(lm: Lm) -> None:
    typed = lm("sample", "a", "--prompt", "the\n", "--seed", "1", "--max-tokens", "9")
    piped = lm("sample", "a", "-", "--seed", "1", "--max-tokens", "9", text="the\n\n")
    newest = lm("sample", "-", "--seed", "1", "--max-tokens", "9", text="the\n\n")
    assert typed.out == piped.out == newest.out
    marked = lm("sample", "a", "-", "--seed", "1", "--max-tokens", "9", text="\ufeffthe\n\r\n".encode())
    wide = lm("sample", "a", "-", "--seed", "1", "--max-tokens", "9", text="the\n\n".encode("utf-16"))
    assert typed.out == marked.out == wide.out


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"the\n\0", "error: Standard input looks like a binary file: byte 4 (line 2) is zero."),
        (b"the\xff", "error: Standard input is not UTF-8: byte 3 (line 1) is 0xff."),
    ],
)
def test_a_prompt_that_is_no_text_is_refused_with_its_place(lm: Lm, data: bytes, sentence: str) -> None:
    done = lm("sample", "a", "-", text=data)
    assert (done.code, done.out) == (1, "") and done.err.startswith(sentence)


def test_a_stop_text_ends_the_sample_and_is_not_printed(lm: Lm) -> None:
    long = json.loads(lm("sample", "a", "--seed", "5", "--max-tokens", "60", "--json").out)
    stop = long["text"][20:22]
    short = json.loads(lm("sample", "a", "--seed", "5", "--max-tokens", "60", "--json", "--stop", stop).out)
    assert short["text"] == long["text"][: long["text"].index(stop)]
    assert (short["finish_reason"], long["finish_reason"]) == ("stop", "length")
    both = json.loads(
        lm("sample", "a", "--seed", "5", "--max-tokens", "60", "--json", "--stop", "~", "--stop", stop).out
    )
    assert both["text"] == short["text"]


def test_json_holds_text_and_what_made_it(lm: Lm) -> None:
    sample = json.loads(lm("sample", "a@last", "--prompt", "the", "--seed", "4", "--max-tokens", "5", "--json").out)
    text = sample.pop("text")
    assert len(text) == 5
    assert sample == {
        "prompt": "the", "index": 0, "seed": 4, "tokens": 5, "finish_reason": "length", "run": "a", "state": "last",
    }  # fmt: skip


def test_out_writes_the_samples_with_options_and_seed(lm: Lm, tmp_path: Path) -> None:
    done = lm("sample", "a", "--prompt", "the", "--seed", "4", "-n", "2", "--max-tokens", "8", "--out", "new/kept.txt")
    saved = (tmp_path / "new" / "kept.txt").read_text("utf-8")
    facts = json.loads(saved.splitlines()[0].removeprefix("# "))
    assert (facts["run"], facts["state"], facts["prompt"]) == ("a", "best", "the")
    assert (facts["options"]["seed"], facts["options"]["max_tokens"]) == (4, 8)
    parts = [part.partition("\n\n")[2].removesuffix("\n") for part in saved.split("\n# sample ")[1:]]
    assert done.out == "\n".join(f"{part}\n" for part in parts)


@pytest.mark.parametrize(
    "prompt", ["Привет, ☃!", "\x00\x1b[31m", "日本語" * 50, "e\u0301", "\U0001f600", "\udcff\ud800"]
)
def test_a_prompt_of_unknown_characters_never_crashes_and_is_noted_once(lm: Lm, prompt: str) -> None:
    done = lm("sample", "a", "--prompt", prompt, "--seed", "1", "--max-tokens", "5", "-n", "2")
    assert done.code == 0
    assert done.err.count("note: The prompt has symbols that the model never saw") == 1


@pytest.mark.parametrize("policy", ["replace", "skip"])
def test_the_policy_for_unknown_characters_can_be_chosen(lm: Lm, policy: str) -> None:
    done = lm("sample", "a", "--prompt", "the☃", "--unknown", policy, "--seed", "1", "--max-tokens", "5")
    assert done.code == 0 and {"replace": "read as unknown", "skip": "left out"}[policy] in done.err
    refused(lm("sample", "a", "--prompt", "the☃", "--unknown", "error"), "Line 1, column 4: '☃' (U+2603)")
    refused(lm("sample", "a", "--unknown", "byte"), "holds no bytes")


def refused(done: Any, sentence: str) -> None:
    assert (done.code, done.out) == (1, ""), done
    assert len(done.err.splitlines()) == 1 and done.err.startswith("error: ") and sentence in done.err, done.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["b"], "No run 'b' in checkpoints."),
        (["a@step-9"], "Run 'a' has no checkpoint 'step-9'. Did you mean 'step-"),
        (["a", "the"], "Unexpected argument 'the': give the prompt with --prompt"),
        (["a", "--temperature", "-1"], "sampling.temperature = '-1': give a number from 0 to 100"),
        (["a", "--temperature", "nan"], "sampling.temperature = 'nan'"),
        (["a", "--temperature", "0.5,inf"], "sampling.temperature = '0.5,inf'"),
        (["a", "--top-k", "0"], "sampling.top_k = 0"),
        (["a", "--top-p", "0"], "sampling.top_p = 0.0"),
        (["a", "--top-p", "1.5"], "sampling.top_p = 1.5"),
        (["a", "--max-tokens", "-1"], "sampling.max_tokens = -1"),
        (["a", "-n", "0"], "sampling.n = 0"),
        (["a", "-n", "2", "--best-of", "1"], "best_of 1 must not be less than n 2"),
        (["a", "--logit-bias", "x"], 'write JSON such as {"13": -100}'),
        (["a", "--banned-token", "99"], "sampling.banned_tokens: token 99 is outside the vocabulary"),
        (["a", "--num-beams", "65"], "sampling.num_beams = 65"),
        (["a", "--state", "chapter"], "Run 'a' has no snapshot 'chapter'"),
        (["a", "--state", "../a"], "Snapshot '../a': use letters"),
        (["a", "--seed", "-1"], "sampling.seed = -1"),
        (["a", "--stop", ""], "a stop text must not be empty"),
        (["a", "--unknown", "guess"], "--unknown 'guess': use replace, skip, byte or error"),
        (["a", "--device", "tpu"], "Device 'tpu' is not available"),
        (["a", "--detokenize"], "--detokenize is for word models"),
    ],
)
def test_bad_input_is_one_sentence(lm: Lm, arguments: list[str], sentence: str) -> None:
    refused(lm("sample", *arguments), sentence)


@pytest.mark.parametrize("arguments", [["-n", "x"], ["--top-k", "x"], ["--what"]])
def test_a_slip_in_the_usage_is_exit_code_2(lm: Lm, arguments: list[str]) -> None:
    assert lm("sample", "a", *arguments).code == 2


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", lambda data: data[: len(data) // 2]),
        ("model.safetensors", lambda data: data[:-4] + b"\0\0\0\1"),
        ("tokenizer.json", lambda data: data[: len(data) // 2]),
        ("config.json", lambda data: data[: len(data) // 2]),
        ("config.json", lambda data: data.replace(b'"hidden_size": 16', b'"hidden_size": 32')),
        ("config.json", lambda data: data.replace(b'"format_version": 1', b'"format_version": 2')),
    ],
)
def test_a_damaged_run_is_one_sentence_that_names_the_file(
    lm: Lm, runs: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = runs / "a" / name
    path.write_bytes(damage(path.read_bytes()))
    refused(lm("sample", "a"), name)


def test_a_file_that_cannot_be_written_is_one_sentence(lm: Lm, tmp_path: Path) -> None:
    done = lm("sample", "a", "--max-tokens", "2", "--out", str(tmp_path))
    assert done.code == 1 and "error: Cannot write " in done.err


def test_without_any_run_it_says_how_to_train_one(lm: Lm, tmp_path: Path) -> None:
    refused(lm("sample", "--runs-dir", str(tmp_path / "none")), "train one with: lm train FILE")


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_failure(runs: Path) -> None:
    root = str(Path(program.__file__).parents[1])
    command = f"'{sys.executable}' -W error -m cli.main sample a --seed 1 --max-tokens 20000 | head -c 30"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=runs.parent, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert len(done.stdout) == 30
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_half_a_surrogate_pair_in_a_prompt_is_written_to_a_file_too(lm: Lm) -> None:
    flags = ("--seed", "1", "--max-tokens", "5", "--out", "out.txt", "--unknown", "skip")
    assert lm("sample", "a", "--prompt", "the\udce4cat", *flags).code == 0
    facts = json.loads(Path("out.txt").read_text("utf-8").splitlines()[0].removeprefix("# "))
    assert (facts["unknown"], facts["options"]["seed"]) == ("skip", 1)


def test_a_folder_cannot_be_the_file_of_samples(lm: Lm) -> None:
    done = lm("sample", "a", "--seed", "1", "--max-tokens", "5", "--out", ".")
    assert done.code == 1 and "error: Cannot write .: it is no file" in done.err


def flags_differ(lm: Lm, *flags: str) -> bool:
    plain = ("--seed", "3", "--max-tokens", "40", "--temperature", "1.2")
    return bool(lm("sample", "a", *plain, *flags).out != lm("sample", "a", *plain).out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--temperature", "0.5,1.5"), ("--min-p", "0.9"), ("--typical-p", "0.2"), ("--repetition-penalty", "2"),
        ("--presence-penalty", "3"), ("--frequency-penalty", "3"), ("--logit-bias", '{"2": 9}'),
        ("--banned-token", "1", "--banned-token", "2"), ("--num-beams", "2"),
        ("--stop-token", "2", "--min-tokens", "3"),
        ("--presence-penalty", "3", "--penalty-window", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_flag_reaches_the_text(lm: Lm, flags: tuple[str, ...]) -> None:
    assert flags_differ(lm, *flags)


def test_samples_of_one_call_are_printed_one_after_the_other(lm: Lm) -> None:
    flags = ("--seed", "3", "--max-tokens", "15", "--prompt", "the ")
    texts = [json.loads(line)["text"] for line in lm("sample", "a", "-n", "3", *flags, "--json").out.splitlines()]
    done = lm("sample", "a", "-n", "3", *flags)
    assert done.out == "\n".join(f"the {text}\n" for text in texts)
    assert re.findall(r"sample \d of 3", done.err) == [f"sample {number} of 3" for number in (1, 2, 3)]


def test_logprobs_are_printed_with_the_text(lm: Lm) -> None:
    flags = ("--seed", "3", "--max-tokens", "5", "--temperature", "0", "--allow-unknown", "--logprobs", "2")
    done = lm("sample", "a", *flags)
    plain = lm("sample", "a", *flags[:-2])
    assert done.out == plain.out
    lines = done.err.splitlines()[:-1]
    assert len(lines) == 5
    for line in lines:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 3 and shares[0] == shares[1] >= shares[2]
    (told,) = (json.loads(line) for line in lm("sample", "a", *flags, "--json").out.splitlines())
    assert [each["logprob"] for each in told["logprobs"]] == [each["top"][0][1] for each in told["logprobs"]]
    assert [each["token"] for each in told["logprobs"]] == [each["top"][0][0] for each in told["logprobs"]]


def test_best_of_prints_the_likeliest_of_the_samples(lm: Lm) -> None:
    flags = ("--seed", "4", "--max-tokens", "9", "--logprobs", "0", "--json")
    every = [json.loads(line) for line in lm("sample", "a", "-n", "5", *flags).out.splitlines()]
    best = max(every, key=lambda told: sum(each["logprob"] for each in told["logprobs"]))
    (chosen,) = (json.loads(line) for line in lm("sample", "a", "--best-of", "5", *flags).out.splitlines())
    assert (chosen["text"], chosen["index"]) == (best["text"], 0)


def test_nothing_but_the_prompt_is_printed_for_max_tokens_0(lm: Lm) -> None:
    assert lm("sample", "a", "--max-tokens", "0", "--prompt", "the").out == "the\n"
