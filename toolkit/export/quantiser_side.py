"""Another process that quantises a GGUF file: llama.cpp's program, or its library in the `cyllama` wheel.

    python quantiser_side.py PROGRAM [--allow-requantize] FILE OUT TYPE THREADS

PROGRAM is a path, or empty for the wheel. Either ends when what started it ends, however that happens; a library that
aborts takes nothing with it. TYPE is a number of `llama_ftype`, which the program takes as well as a name.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Become the program, or call the library."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    program, *given = arguments
    if program:
        os.execv(program, [program, *given])
    from cyllama.llama import llama_cpp

    *options, source, made, number, threads = given
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread, params.allow_requantize = int(number), int(threads), bool(options)
    llama_cpp.model_quantize(source, made, params)


if __name__ == "__main__":
    main(sys.argv[1:])
