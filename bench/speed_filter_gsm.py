"""Latency of a batch in networks of the shapes that FilterGSM and its baseline end with.

`python -m bench.methods filter_gsm --speed` keeps what this measures.
"""

from __future__ import annotations

from bench.speed_adaptive import latencies_of
from taylor_kernels.studies.methods.filter_gsm import FILTER_GSM
from taylor_kernels.studies.results import Json


def measure() -> Json:
    return latencies_of("filter_gsm", FILTER_GSM)
