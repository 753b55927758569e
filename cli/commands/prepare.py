"""lm prepare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_RUNS, Json, RunsDir, field
from lm.config import CorpusConfig, Section, expanded, parse_assignments, parse_value, validate
from lm.errors import ConfigError

POSITION = 20


def command(
    source: Annotated[
        str, typer.Argument(help="A folder, a glob, or hf:NAME[/CONFIG], which is streamed.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=expanded, help="Folder of the shards, for lm train.")],
    shards: Annotated[int, typer.Option(min=1, help="Number of shards.")] = 1,
    shard: Annotated[
        int | None,
        typer.Option(min=0, help="Prepare only this shard (from 0). Default: all.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="RUN|FILE", help="Use the tokenizer of a run or a file.", show_default=False),
    ] = None,
    tokenizer_only: Annotated[
        bool, typer.Option("--tokenizer-only", help="Train the tokenizer of all shards, and stop.")
    ] = False,
    tokenizer_mb: Annotated[
        float, typer.Option(min=0.001, help="Train the tokenizer on this many million characters.")
    ] = 100.0,
    valid_every: Annotated[
        int, typer.Option(min=2, help="Use every N-th piece of 64,000 characters for validation.")
    ] = 200,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="tokenizer.FIELD=VALUE", help="Any tokenizer option; repeatable."),
    ] = None,
    text_column: Annotated[str | None, field(CorpusConfig, "text_column")] = None,
    encoding: Annotated[str | None, field(CorpusConfig, "encoding")] = None,
    runs_dir: RunsDir = DEFAULT_RUNS,
    as_json: Json = False,
) -> None:
    """Tokenize a large text into shards, each in its own job if you like.

    \b
    lm prepare 'texts/*.jsonl' OUT --tokenizer-only --set tokenizer.size=16000
    lm prepare 'texts/*.jsonl' OUT --shards 64 --shard 0    (and 1 to 63)
    lm train OUT
    """
    from cli.output import print_json, reading, say
    from lm.corpora.shards import TOKENIZER, adopt_tokenizer, learn_tokenizer, prepare_shard
    from lm.files import check_place
    from lm.runs.run import load

    given = {"source": source, "text_column": text_column, "encoding": encoding}
    config = validate(CorpusConfig, {name: value for name, value in given.items() if value is not None}, where="corpus")
    chosen = {path: parse_value(value) for path, value in parse_assignments(set_ or []).items()}
    if strange := [path for path in chosen if not path.startswith("tokenizer.")]:
        raise ConfigError(f"--set {strange[0]}: lm prepare has tokenizer options only.")
    if tokenizer is not None and chosen:
        raise ConfigError(f"--tokenizer {tokenizer} is trained already: leave --set out.")
    section = Section(**{"type": "subword", **{path.partition(".")[2]: value for path, value in chosen.items()}})
    section.resolve("tokenizer")
    check_place(out / TOKENIZER)
    with reading() as progress:
        if tokenizer is not None:
            path = expanded(tokenizer)
            adopt_tokenizer(out, path if path.is_file() else load(tokenizer, runs_dir=runs_dir).tokenizer)
        elif tokenizer_only or (shard is None and not (out / TOKENIZER).is_file()):
            learn_tokenizer(config, out, section, characters=int(tokenizer_mb * 1e6))
        if tokenizer_only:
            where = f"{shlex.quote(source)} {shlex.quote(str(out))}"
            say(f"Wrote {out / TOKENIZER}, the tokenizer of all shards.")
            say(f"Next: lm prepare {where} --shards N --shard 0")
            return
        numbers = range(shards) if shard is None else [shard]
        made = [
            prepare_shard(config, out, number, shards, valid_every=valid_every, progress=progress) for number in numbers
        ]
    found = [
        {"shard": each.name, **{name: split.counts.tokens for name, split in each.splits.items()}} for each in made
    ]
    if as_json:
        print_json(found)
        return
    for each in found:
        typer.echo(f"{out / str(each['shard'])}: {each['train']:,} training and {each['valid']:,} validation tokens")
    say(f"When all {shards} shards are there: lm train {shlex.quote(str(out))}")
