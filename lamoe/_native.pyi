"""
The compiled kernels. Use them through lamoe.backends.cpu and lamoe.kernels.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray

def train_linear(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: str,
    /,
) -> None: ...
def train_linear_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: str,
    /,
) -> None: ...
def train_plan(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, /) -> None: ...
def train_experts(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: str,
    /,
) -> None: ...
def train_experts_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: str,
    /,
) -> None: ...
def train_attention(
    arg0: Sequence[int],
    arg1: Sequence[int],
    arg2: Sequence[int],
    arg3: float,
    arg4: int,
    arg5: str,
    /,
) -> None: ...
def train_attention_backward(
    arg0: Sequence[int],
    arg1: Sequence[int],
    arg2: Sequence[int],
    arg3: float,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: str,
    /,
) -> None: ...
def train_spans(arg0: int, arg1: int, arg2: int, arg3: int, /) -> bool: ...
def train_cross_entropy(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: float,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: str,
    /,
) -> float: ...
def train_kept_bytes() -> int: ...
def train_rms_norm(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: float,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: str,
    /,
) -> None: ...
def train_rms_norm_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: str,
    /,
) -> None: ...
def train_swiglu(
    arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: int, arg7: str, /
) -> None: ...
def train_swiglu_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: str,
    /,
) -> None: ...
def train_embedding_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: str,
    /,
) -> None: ...
def train_route(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: bool,
    arg8: float,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: str,
    /,
) -> None: ...
def train_route_backward(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: bool,
    arg8: float,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
    arg19: str,
    /,
) -> None: ...
def train_add_gradients(arg0: bytes, arg1: int, arg2: str, /) -> None: ...
def train_squared_norm(arg0: bytes, arg1: int, arg2: str, /) -> float: ...
def train_adamw(
    arg0: bytes,
    arg1: float,
    arg2: float,
    arg3: float,
    arg4: float,
    arg5: float,
    arg6: int,
    arg7: str,
    /,
) -> None: ...
def count_units(text: bytes) -> int:
    """Return the number of units (see UnitEncoder) in a text in UTF-8."""

class UnitEncoder:
    """
    Encodes texts in UTF-8 with caches of the ids of units and words.

    A unit is a blank and the characters up to the next white space, or white space.
    """

    def __init__(self, max_entries: int) -> None:
        """Each cache holds at most `max_entries`."""

    def start(self, text: bytes) -> bytes | None:
        """
        Begin a text. Return the first piece that is in no cache, or None. It is a word if it
        is in ASCII, otherwise a unit.
        """

    def supply(self, ids: bytes) -> bytes | None:
        """
        Give the ids of the missing piece, as bytes. Return the next one, or None.
        """

    def ids(self) -> bytes:
        """Return the ids of the text, as the bytes of `supply`."""

    @property
    def num_units(self) -> int:
        """Units in the cache."""

    @property
    def num_words(self) -> int:
        """Words in the cache."""

def isa() -> str:
    """Return the instruction set in use, one of `features`."""

def features() -> str:
    """
    Return the instruction sets that this CPU runs, best first, separated by ', '.
    """

def mat_bytes(fmt: int, n: int, k: int) -> int:
    """Return the bytes of a packed matrix [n, k]."""

def pack(
    fmt: int,
    w: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    importance: Annotated[
        NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
    ]
    | None = None,
    feedback: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ]
    | None = None,
    threads: int = 1,
    isa: str = "",
) -> tuple[NDArray[numpy.uint8], float]:
    """
    Pack a matrix [n, k]. Return (bytes, scale).

    importance [k] weights the squared errors of the inputs when an int4 scale is chosen.
    feedback [k, k] is unit upper triangular: the rounding error e of input i changes each
    later input j by -e * feedback[i, j] before it is rounded.
    """

def unpack(
    fmt: int,
    data: Annotated[
        NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)
    ],
    n: int,
    k: int,
    scale: float,
    isa: str = "",
) -> NDArray[numpy.float32]:
    """Return the stored values of a packed matrix as float32 [n, k]."""

def linear(
    fmt: int,
    data: Annotated[
        NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)
    ],
    scale: float,
    n: int,
    x: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    isa: str = "",
) -> NDArray[numpy.float32]:
    """
    Multiply rows x [m, k] by a packed matrix [n, k], transposed. Return [m, n].
    """

def encode(
    codec: Sequence[int],
    rows: Annotated[
        NDArray[numpy.float32], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    isa: str = "",
) -> NDArray[numpy.uint8]:
    """Encode cache rows. Return uint8 [rows, row bytes]."""

def decode(
    codec: Sequence[int],
    rows: Annotated[
        NDArray[numpy.uint8], dict(shape=(None, None), order="C", device="cpu", writable=False)
    ],
    isa: str = "",
) -> NDArray[numpy.float32]:
    """Decode cache rows. Return float32 [rows, width]."""

def probe(
    buffer: Annotated[
        NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)
    ],
    threads: int,
) -> tuple[float, float, float, float]:
    """
    Measure this machine with all threads. `buffer` should be far larger than the caches.

    Return (bytes read, int8, bf16 and fp32 multiply-adds) per second.
    """

def cheaper_form(settings: dict, tokens: int, rows: int) -> str:
    """
    Return the form of attention, 'absorb' or 'expand', that a model with these settings
    uses for `tokens` new tokens of a sequence that then has `rows` cached rows.
    """

def max_state_bytes(settings: dict, max_rows: int, max_sequences: int, step_tokens: int) -> int:
    """
    Return an upper bound of what a model with these settings allocates for the partial
    results of attention, in steps of up to step_tokens tokens of up to max_sequences
    sequences with up to max_rows cached rows each.
    """

def watch_mapping(
    data: Annotated[
        NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)
    ],
    message: str,
) -> int:
    """
    Watch a mapped file. If a read of `data` fails, for example because the file was truncated,
    write `message` to standard error and exit with code 74. Return an id.
    """

def unwatch_mapping(id: int) -> None:
    """Stop watching a mapped file, before it is unmapped."""

class Model:
    """
    A model over packed weights. It keeps references to all arrays it is given.
    """

    def __init__(self, settings: dict, threads: int) -> None: ...
    def set(
        self,
        layer: int,
        name: str,
        fmt: int,
        n: int,
        k: int,
        data: Annotated[
            NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        scales: Sequence[float],
    ) -> None:
        """
        Set a matrix, or a stack of len(scales) matrices that follow each other in `data`.
        """

    def vector(
        self,
        layer: int,
        name: str,
        data: Annotated[
            NDArray[numpy.float32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
    ) -> None:
        """Set the weights of a norm."""

    def raw(
        self,
        layer: int,
        name: str,
        data: Annotated[
            NDArray[numpy.uint8], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
    ) -> None:
        """Set an array of plain elements: `embed` or `uk_rows`."""

    def step(
        self,
        ids: Annotated[
            NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        cos_sin: Annotated[
            NDArray[numpy.float32],
            dict(shape=(None, None), order="C", device="cpu", writable=False),
        ],
        seqs: Annotated[
            NDArray[numpy.int32], dict(shape=(None, None), order="C", device="cpu", writable=False)
        ],
        pages: Annotated[
            NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        rows: Annotated[
            NDArray[numpy.uint8], dict(shape=(None, None, None), order="C", device="cpu")
        ],
        page: int,
        format: Sequence[int],
        out_rows: Annotated[
            NDArray[numpy.int32], dict(shape=(None,), order="C", device="cpu", writable=False)
        ],
        logits: bool,
        experts: bool,
    ) -> tuple[NDArray[numpy.float32], NDArray[numpy.int16]]:
        """
        Compute one step and append its rows to the cache.

        Args:
            ids: int32 [tokens].
            cos_sin: float32 [tokens, rope], cosines and then sines of each position.
            seqs: int32 [sequences, 3]: tokens in this step, rows after it, and where the
                sequence's pages begin in `pages`.
            pages: int32, the pages of all sequences.
            rows: uint8 [layers, slots, row bytes], the cache. It is written.
            page: slots of a page.
            format: the cache format, as codec_numbers gives it.
            out_rows: int32, the tokens whose results are wanted.
            logits: return logits, else final states after the norm.
            experts: also return the chosen experts.

        Returns:
            (float32 [out_rows, vocabulary or hidden], int16 [MoE layers, tokens, top_k]).
        """

    @property
    def threads(self) -> int:
        """Threads of a step."""

    @property
    def state_bytes(self) -> int:
        """Bytes allocated so far for partial results of attention."""

    @property
    def state_limit(self) -> int:
        """Limit of these bytes, unless a single token needs more."""

    @state_limit.setter
    def state_limit(self, arg: int, /) -> None: ...
