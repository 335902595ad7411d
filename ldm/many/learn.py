"""Learn many concepts: each is a run of its own, which resumes, in a process of its own or on another machine."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ldm.files.writing import replace_text
from ldm.many.cluster import connected, learn_on
from ldm.many.jobs import Job, Learned, Setting
from ldm.many.pool import learn_locally, visible_gpus

COLUMNS = ("name", "image", "method", "steps", "seconds", "result")  # of `concepts.csv`


def learn_many(
    jobs: Sequence[Job], setting: Setting, out: Path, workers: int | None, cluster: str | None, gpu_share: float
) -> Iterator[Learned]:
    """Learn concepts on this machine, or on a Ray cluster, and yield each as soon as it is there.

    A failure stops no other. A process that was killed is started again, which resumes its run, twice at most.

    Args:
        workers: processes at a time on this machine; None: one for each GPU, else for each core.
        cluster: address of a Ray cluster: "local", "auto" or HOST:PORT.
        gpu_share: of a GPU, for each concept on the cluster.
    """
    if cluster:
        with connected(cluster) as ray:
            yield from learn_on(ray, jobs, setting, out, gpu_share)
        return
    gpus = visible_gpus()
    yield from learn_locally(jobs, setting, out, workers or len(gpus) or os.cpu_count() or 1, gpus)


def write_table(jobs: Sequence[Job], results: Sequence[Learned], out: Path) -> str:
    """Write `concepts.csv`, and return it as a text for the terminal."""
    learned = {found.job.name: found for found in results}
    rows = []
    for job in jobs:
        found = learned.get(job.name)
        seconds = f"{found.seconds:.0f}" if found and found.seconds else ""
        result = (found.error if found else "") or ("learned" if found else "learned before")
        rows.append((job.name, str(job.image), job.method or "", str(job.steps or ""), seconds, result))
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *rows])
    replace_text(out / "concepts.csv", text.getvalue())
    shown = [(row[0], row[4], row[5]) for row in (COLUMNS, *rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {seconds:>{widths[1]}}  {result}" for name, seconds, result in shown)
