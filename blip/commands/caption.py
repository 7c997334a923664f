"""Caption folders of pictures: a text file beside each, or one table."""

import argparse
import asyncio
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from blip.commands.client import header
from blip.config import Settings
from blip.errors import UserError
from blip.folder.askers import Asker, Local, NoServerError, Remote
from blip.folder.find import pictures
from blip.folder.outputs import Beside, Csv, JsonLines, Output, Parquet, Row
from blip.folder.questions import Question

AHEAD = 4  # times as many pictures as are asked about at a time are begun before the first of them is written
SECONDS = 10.0  # between two lines where there is no terminal
TABLES: dict[str, type[Csv | JsonLines]] = {"csv": Csv, "jsonl": JsonLines, "parquet": Parquet}
STOPPED = 130  # the exit status after Ctrl-C


def main(given: Sequence[str]) -> int:
    """Caption what is not captioned yet; what failed is listed at the end."""
    options = parse(given)
    try:
        found = pictures(options.paths, recursive=options.recursive)
        question = asked(options)
        output = chosen(options, found, question)
        todo = [picture for picture in found if not output.is_done(picture)]
        print(f"{len(todo)} of {len(found)} pictures to do.", file=sys.stderr)
        asker = begin(options) if todo else None
    except UserError as error:
        print(f"blip caption: {error}", file=sys.stderr)
        return 2
    failed: list[tuple[Path, str]] = []
    try:
        if asker:
            asyncio.run(work(todo, asker, question, output, failed, Progress(len(todo))))
        output.close()
    except NoServerError as error:
        print(f"blip caption: {error} Run it again to go on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; run it again to go on.", file=sys.stderr)
        return STOPPED
    finally:
        if asker:
            asker.close()
        tell(failed, options.errors)
    return int(bool(failed))


def parse(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("caption", description=__doc__)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a file, a folder, or a pattern in quotes")
    parser.add_argument("--recursive", action="store_true", help="folders in folders too")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--extension", default=".txt", help="of the file beside each picture (default %(default)s)")
    for name in TABLES:
        where.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"one table, as {name}")
    parser.add_argument("--prefix", default="", help="before each caption")
    parser.add_argument("--postfix", default="", help="after each caption")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--question", metavar="TEXT", help="answer it, in place of captioning")
    what.add_argument("--match", metavar="TEXT", help="how well TEXT goes with a picture, in place of captioning")
    parser.add_argument("--overwrite", action="store_true", help="do again what is done")
    parser.add_argument("--errors", type=Path, metavar="FILE", help="list the pictures that failed there too")
    parser.add_argument(
        "--url",
        action="append",
        metavar="URL",
        help="ask this server; more than once: all of them (default: compute here)",
    )
    parser.add_argument(
        "--header", type=header, action="append", default=[], metavar="NAME:VALUE", help="for a gateway"
    )
    parser.add_argument("--weights", help="demo, pretrained or a directory, to compute here (default: BLIP_WEIGHTS)")
    return parser.parse_args(given)


def asked(options: argparse.Namespace) -> Question:
    """What is asked about each picture."""
    for name in ("question", "match"):
        text = getattr(options, name)
        if text is not None and not text.strip():
            raise UserError(f"--{name} is blank; give it a text.")
    if options.question is not None:
        return Question("visual_question_answering", options.question)
    if options.match is not None:
        return Question("image_text_matching", options.match)
    return Question("image_captioning", "", options.prefix, options.postfix)


def chosen(options: argparse.Namespace, found: Iterable[Path], question: Question) -> Output:
    """Where results go."""
    for name, table in TABLES.items():
        if path := getattr(options, name):
            try:
                return table(path, question.columns, overwrite=options.overwrite)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise UserError(f"{path} cannot be used ({reason}); choose another file.") from error
    return Beside(found, options.extension, overwrite=options.overwrite)


def begin(options: argparse.Namespace) -> Asker:
    """Who is asked."""
    if options.url:
        return Remote(options.url, dict(options.header))
    settings = Settings.from_environment(
        {**os.environ, **({"BLIP_WEIGHTS": options.weights} if options.weights else {})}
    )
    return Local(settings)


async def work(
    todo: Sequence[Path],
    asker: Asker,
    question: Question,
    output: Output,
    failed: list[tuple[Path, str]],
    progress: "Progress",
) -> None:
    """Ask about all, several at a time; write in their order, each as soon as those before it are written."""
    room = asyncio.Semaphore(asker.at_a_time)

    async def ask(picture: Path) -> Row:
        async with room:
            return await asker.ask(picture, question)

    begun: deque[tuple[Path, asyncio.Task[Row]]] = deque()

    async def finish_first() -> None:
        picture, asking = begun.popleft()
        try:
            output.write(picture, await asking)
        except UserError as error:
            failed.append((picture, str(error)))
        except OSError as error:
            failed.append((picture, f"its result cannot be written: {error.strerror}"))
        progress.step(len(failed))

    try:
        for picture in todo:
            begun.append((picture, asyncio.create_task(ask(picture))))
            if len(begun) >= AHEAD * asker.at_a_time:
                await finish_first()
        while begun:
            await finish_first()
    finally:
        progress.end()
        for _, asking in begun:
            asking.cancel()
        await asyncio.gather(*(asking for _, asking in begun), return_exceptions=True)


class Progress:
    """How far it is: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._failed = total, 0, 0
        self._began = self._told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" pictures", smoothing=0.05)

    def step(self, failed: int) -> None:
        """One more is done."""
        self._done, self._failed = self._done + 1, failed
        if self._bar is not None:
            self._bar.set_postfix(failed=failed, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._told >= SECONDS:
            self._told = time.monotonic()
            rate = self._done / (self._told - self._began)
            left = (self._total - self._done) / rate
            self._tell(f"{rate:.1f} per s, {left:.0f} s left")

    def end(self) -> None:
        """All that will be done is done."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._tell(f"{time.monotonic() - self._began:.1f} s")

    def _tell(self, more: str) -> None:
        print(f"{self._done} of {self._total}, {more}, {self._failed} failed", file=sys.stderr, flush=True)


def tell(failed: Sequence[tuple[Path, str]], errors: Path | None) -> None:
    """List the pictures that failed."""
    lines = [f"{picture}: {sentence}" for picture, sentence in failed]
    if lines:
        print("\n".join(["These failed:", *lines]), file=sys.stderr)
    if errors:
        errors.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
