"""`deinterleave` groups every second element of a dim, or every third and so on.

>>> import torch
>>> ADAPTER.kernel({"dim": 0, "parts": 2}, [torch.tensor([1, 10, 2, 20, 3, 30])], None)[0].tolist()
[1, 2, 3, 10, 20, 30]
"""

from __future__ import annotations

from ckptsurgeon.adapters.layout.regroup import fill_parted, parted_shape, regrouped
from ckptsurgeon.adapters.op import Adapter, each, same_op, signed, whole

ADAPTER = Adapter(
    words="every `parts`-th element of dim `dim` together, p parts of n: out[j * n + i] = in[i * p + j]",
    fields={"dim": signed, "parts": whole},
    infer=each(parted_shape),
    fill=fill_parted,
    kernel=each(lambda op, tensor: regrouped(tensor, op["dim"], tensor.shape[op["dim"]] // op["parts"], op["parts"])),
    moments=same_op,
    invert=lambda op: {**op, "op": "interleave"},
)
