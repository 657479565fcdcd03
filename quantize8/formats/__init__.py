"""One module for each format of weights: what it holds, and how it is read and written. Lists of their names."""

from typing import Literal, get_args

BITSANDBYTES, COMPRESSED_TENSORS, GGUF = "bitsandbytes", "compressed-tensors", "gguf"
DEFAULT_FORMAT = BITSANDBYTES
FLOAT_FORMATS = ("float16", "bfloat16", "float32")
FORMATS = (BITSANDBYTES, COMPRESSED_TENSORS, GGUF, *FLOAT_FORMATS)
Scheme = Literal["w8a8", "w8a16"]  # of compressed-tensors
MoeLoader = Literal["vllm", "transformers"]  # of compressed-tensors: how its experts are laid out
SCHEMES, MOE_LOADERS = get_args(Scheme), get_args(MoeLoader)
GROUPED_SCHEME: Scheme = "w8a16"  # the one whose scales can be by group
GROUP_SIZES = (32, 64, 128)  # those that vLLM's Marlin kernels multiply with
DEFAULT_SHARD_SIZE = "5GB"  # transformers' and the hub's default
