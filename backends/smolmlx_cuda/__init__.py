"""The PyTorch engine: TRL's trainer on our batches, PEFT adapters, Unsloth where it is installed and fits.

On an NVIDIA GPU by default; on a CPU or on MPS when `--device` asks for it. torch is imported by the modules of this
package, which are imported when they are first needed.
"""

from smolmlx_cuda.engine import CudaBackend

backend = CudaBackend()
__all__ = ["backend"]
