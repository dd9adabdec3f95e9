"""What CUDA, NCCL, gloo and the driver say when they fail, and which class of failure it is: one table.

A row is found by its ``phrases``, parts of what is said. The first row that fits counts, so that what a process says of
its own GPU stands before what it says of its peers, and the general below the special. The texts are those of the
libraries in the image (torch 2.13, CUDA 13.0, NCCL 2.29.7): a test looks for the first phrase of each row in the binary
that ``library`` names. Rows without a library are those of the driver, of Linux or of its loader.
"""

from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from lora_api.failures import GOES_ON, NEW_RUN, FailureClass


class Blame(StrEnum):
    """Whose fault it is: that of the process that says it, of another one, or of its node for all that run there."""

    OWN = "own rank"
    PEER = "peer"
    NODE = "node"


@dataclass(frozen=True)
class GpuError:
    """A way to fail. ``text`` is an example, as printed. ``remedy`` is set where that of the class says too little."""

    phrases: tuple[str, ...]
    text: str
    library: str
    source: str
    failure_class: FailureClass
    blame: Blame
    remedy: str = ""

    def fits(self, text: str) -> bool:
        """Whether ``text`` has all phrases."""
        return all(phrase in text for phrase in self.phrases)


CUDART = "nvidia/cu13/lib/libcudart.so.13"
NCCL = "nvidia/nccl/lib/libnccl.so.2"
CUDNN = "nvidia/cudnn/lib/libcudnn_graph.so.9"
BITSANDBYTES = "bitsandbytes/libbitsandbytes_cuda130.so"
C10 = "torch/lib/libc10.so"
C10_CUDA = "torch/lib/libc10_cuda.so"
TORCH_CPU = "torch/lib/libtorch_cpu.so"
TORCH_CUDA = "torch/lib/libtorch_cuda.so"
TORCH_PYTHON = "torch/lib/libtorch_python.so"

_RESULTS = {
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)": "ncclUnhandledCudaError: Call to CUDA function "
    "failed.",
    "unhandled system error (run with NCCL_DEBUG=INFO for details)": "ncclSystemError: System call (e.g. socket, "
    "malloc) or external library call failed or device error. ",
    "invalid usage (run with NCCL_DEBUG=WARN for details)": "ncclInvalidUsage: This usually reflects invalid usage of "
    "NCCL library.",
    "remote process exited or there was a network error": "ncclRemoteError: A call failed possibly due to a network "
    "error or a remote process exiting prematurely.",
}
_CUDA, _SYSTEM, _USAGE, _REMOTE = _RESULTS


def _nccl(result: str, last: str) -> str:
    """How torch puts an error of NCCL (NCCLUtils.cpp, getNcclErrorDetailStr)."""
    where = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699"
    return f"{where}, {result}, NCCL version 2.29.7\n{_RESULTS[result]}\nLast error:\n{last}"


_BESIDE_TORCH = (
    "The GPU is full outside of torch's own memory: halve training.microBatchSize, or use more GPUs. If it happens "
    "before step 1, another process holds the GPU (nvidia-smi on the node)."
)
_SHARED_MEMORY = (
    "The pod's /dev/shm is full. It is memory of the pod: raise podTemplate.resources.limits.memory, and sizeLimit of "
    f"the volume where a runtime sets one. That takes {NEW_RUN}."
)
_LOCKED_MEMORY = (
    "InfiniBand needs locked memory: set LimitMEMLOCK=infinity for containerd on the nodes (ulimit -l in a pod shows "
    f"it), then {GOES_ON}. Or set NCCL_IB_DISABLE=1 in podTemplate.env to use TCP: that takes {NEW_RUN}."
)
_HOST_MEMORY = (
    "The memory of the pod or of its node is used up. Where it is the node's, use nodes with more, then "
    f"{GOES_ON}. To raise podTemplate.resources.limits.memory takes {NEW_RUN}."
)
_IMAGE = (
    "The image lacks a library or has it in another version than torch: use the trainer's image that belongs to this "
    "operator, or rebuild yours from it."
)
_OLD_DRIVER = (
    "Upgrade the driver of the nodes to one for CUDA 13.0 (580 or newer), or use a trainer's image built "
    "for an older CUDA."
)
_OLD_GPU = (
    "Use GPUs of a generation that the image was built for (nvidia-smi --query-gpu=compute_cap): nodeSelector in "
    "podTemplate or in the runtime chooses the nodes."
)
_NO_BFLOAT16 = (
    "Use GPUs that have bfloat16, Ampere or newer (nodeSelector in podTemplate or in the runtime chooses the nodes), "
    "or set quantization.computeDtype to float32."
)
_NO_PEER_COPIES = (
    f"Upgrade the driver of the nodes to 550.40.07 or newer, then {GOES_ON}. Or set NCCL_P2P_DISABLE=1 and "
    f"NCCL_IB_DISABLE=1 in podTemplate.env: that takes {NEW_RUN}."
)
_SHARED_GPU = (
    "Each process needs a whole GPU of its own: NCCL joins neither time-sliced GPUs nor two MIG slices of one. Use "
    "nodes that give out whole GPUs, or gpusPerNode: 1 and nodes: 1."
)
_FABRIC_MANAGER = (
    "On the node: systemctl status nvidia-fabricmanager (it must be of the driver's version), nvidia-smi -q | grep -A3 "
    "Fabric. kubectl cordon the node until it says Completed."
)
_RELOADED_DRIVER = (
    "The driver was upgraded under a running node: drain and reboot it. kubectl cordon keeps other "
    "runs away until then."
)
_VOCABULARY = (
    "Usually a token id is beyond the model's vocabulary: the tokenizer has tokens that the model has no row for. Use "
    "the tokenizer of this model, or declare newTokens. The log has the assertion."
)
_NETWORK = (
    "Another pod's failure may explain it. Otherwise check the network between the nodes: "
    "NCCL_SOCKET_IFNAME and NCCL_IB_HCA in podTemplate.env, and that no NetworkPolicy or firewall is in the way."
)
_SLOW_PEER = (
    "Another pod's failure may explain it. Otherwise a rank hangs or is too slow: look at the node of "
    "the silent pod, or raise parallelism.collectiveTimeoutSeconds."
)


def _row(
    failure_class: FailureClass, blame: Blame, library: str, phrases: str | tuple[str, ...], text: str, source: str,
    remedy: str = "",
) -> GpuError:  # fmt: skip
    parts = (phrases,) if isinstance(phrases, str) else phrases
    return GpuError(parts, text, library, source, failure_class, blame, remedy)


def _cuda(
    failure_class: FailureClass, blame: Blame, phrase: str, name: str, code: int, remedy: str = ""
) -> GpuError:  # fmt: skip
    """One of cudaGetErrorString's, as torch, NCCL and bitsandbytes pass it on."""
    source = f"CUDA runtime 13.0, {name} ({code}); torch c10/cuda/CUDAException.cpp"
    return _row(failure_class, blame, CUDART, phrase, f"CUDA error: {phrase}", source, remedy)


OWN, PEER, NODE = Blame
_FULL, _HOST, _LIMIT = FailureClass.GPU_OUT_OF_MEMORY, FailureClass.HOST_OUT_OF_MEMORY, FailureClass.LIMIT_TOO_LOW
_FAULT, _AWAY, _KERNEL = FailureClass.GPU_FAULT, FailureClass.GPU_UNAVAILABLE, FailureClass.GPU_KERNEL_FAILED
_UNFIT, _LOST = FailureClass.GPU_UNSUPPORTED, FailureClass.PEER_LOST

_MEMORY = (
    _row(_FULL, OWN, C10_CUDA, "CUDA out of memory.",
         "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB "
         "is free.",
         "torch c10/cuda/CUDACachingAllocator.cpp"),
    _row(_FULL, OWN, CUDART, ("out of memory", "CUDA error"), "CUDA error: out of memory",
         "CUDA runtime 13.0, cudaErrorMemoryAllocation (2)", _BESIDE_TORCH),
    _row(_FULL, OWN, CUDART, ("out of memory", "CUDA driver error"), "CUDA driver error: out of memory",
         "torch c10/cuda/driver_api.h, expandable segments", _BESIDE_TORCH),
    _row(_FULL, OWN, CUDART, ("out of memory", "Cuda failure"), _nccl(_CUDA, "Cuda failure 2 'out of memory'"),
         "NCCL 2.29.7 src/include/cudawrap.h:36", _BESIDE_TORCH),
    _row(_FULL, OWN, BITSANDBYTES, (" in file ", "Error out of memory at line "),
         "Error out of memory at line 415 in file /src/csrc/ops.cu", "bitsandbytes 0.50.2 csrc/ops.cu", _BESIDE_TORCH),
    _row(_FULL, OWN, TORCH_CUDA, "CUBLAS_STATUS_ALLOC_FAILED",
         "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
         "torch aten/src/ATen/cuda/CUDAContext.cpp", _BESIDE_TORCH),
    _row(_FULL, OWN, TORCH_CUDA, "CUBLAS_STATUS_NOT_INITIALIZED",
         "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
         "torch aten/src/ATen/cuda/CUDAContext.cpp", _BESIDE_TORCH),
    _row(_FULL, OWN, CUDNN, "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
         "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuDNN 9.20, cudnnGetErrorString",
         _BESIDE_TORCH),
    _row(_FULL, OWN, NCCL, "Failed to CUDA calloc", _nccl(_CUDA, "Failed to CUDA calloc async 608 bytes"),
         "NCCL 2.29.7 src/include/alloc.h:440", _BESIDE_TORCH),
    _row(_FULL, OWN, NCCL, "Failed to CUDA malloc", _nccl(_CUDA, "Failed to CUDA malloc 4194304 bytes"),
         "NCCL 2.29.7 src/include/alloc.h:389", _BESIDE_TORCH),
    _row(_HOST, OWN, NCCL, "Failed to CUDA host alloc", _nccl(_CUDA, "Failed to CUDA host alloc 9637888 bytes"),
         "NCCL 2.29.7 src/include/alloc.h:136", _HOST_MEMORY),
    _row(_HOST, OWN, C10, "DefaultCPUAllocator: can't allocate memory",
         "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
         "allocate 17179869184 bytes. Error code 12 (Cannot allocate memory)", "torch c10/core/impl/alloc_cpu.cpp",
         _HOST_MEMORY),
)  # fmt: skip

_LIMITS = (
    _row(_LIMIT, NODE, NCCL, ("shared memory segment", "No space left on device"),
         _nccl(_SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-WU88OE (size 9637888), error: No "
                        "space left on device (28)"), "NCCL 2.29.7 src/misc/shmutils.cc:132", _SHARED_MEMORY),
    _row(_LIMIT, NODE, TORCH_CPU, "unable to allocate shared memory(shm) for file <",
         "unable to allocate shared memory(shm) for file </torch_41_2718281828_0>: No space left on device (28)",
         "torch aten/src/ATen/MapAllocator.cpp", _SHARED_MEMORY),
    _row(_LIMIT, NODE, TORCH_PYTHON, "workers are out of shared memory",
         "DataLoader worker (pid 73) is killed by signal: Bus error. It is possible that dataloader's workers are "
         "out of shared memory. Please try to raise your shared memory limit.", "torch torch/csrc/DataLoader.cpp",
         _SHARED_MEMORY),
    _row(_LIMIT, NODE, "", ("No space left on device", "/dev/shm"),  # noqa: S108 - what the error says
         "[Errno 28] No space left on device: '/dev/shm/lora-x'", "Linux, ENOSPC; NVIDIA/nccl#290", _SHARED_MEMORY),
    _row(_LIMIT, NODE, NCCL, ("Call to ibv_reg_mr", "Cannot allocate memory"),
         _nccl(_SYSTEM, "Call to ibv_reg_mr failed with error Cannot allocate memory"),
         "NCCL 2.29.7 src/misc/ibvwrap.cc:43; NVIDIA/nccl-tests#206", _LOCKED_MEMORY),
    _row(_LIMIT, NODE, NCCL, ("Call to ibv_create_", "Cannot allocate memory"),
         _nccl(_SYSTEM, "Call to ibv_create_cq failed with error Cannot allocate memory"),
         "NCCL 2.29.7 src/misc/ibvwrap.cc:218; openucx/ucx#8229", _LOCKED_MEMORY),
    _row(_LIMIT, NODE, "", "Too many open files", "[Errno 24] Too many open files", "Linux, EMFILE",
         f"Raise LimitNOFILE of containerd on the nodes (ulimit -n in a pod shows it), then {GOES_ON}."),
    _row(_HOST, OWN, "", "Cannot allocate memory", "[Errno 12] Cannot allocate memory", "Linux, ENOMEM", _HOST_MEMORY),
)  # fmt: skip

_MISFITS = (
    _row(_UNFIT, NODE, "", ("libnccl.so", "cannot open shared object file"),
         "libnccl.so.2: cannot open shared object file: No such file or directory", "ld.so; pytorch/pytorch#2375",
         _IMAGE),
    _row(_UNFIT, NODE, "", ("libcudart.so", "cannot open shared object file"),
         "libcudart.so.13: cannot open shared object file: No such file or directory", "ld.so", _IMAGE),
    _row(_UNFIT, NODE, "bitsandbytes/cextension.py", "not available in CPU-only version of bitsandbytes",
         "Method 'cdequantize_blockwise_bf16_nf4' not available in CPU-only version of bitsandbytes.\nReinstall with "
         "GPU support or use CUDA-enabled hardware.", "bitsandbytes 0.50.2 cextension.py:98", _IMAGE),
    _row(_UNFIT, NODE, "torch/cuda/__init__.py", "Torch not compiled with CUDA enabled",
         "Torch not compiled with CUDA enabled", "torch 2.13 torch/cuda/__init__.py:522", _IMAGE),
    _row(_UNFIT, NODE, C10_CUDA, "The NVIDIA driver on your system is too old",
         "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by "
         "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx",
         "torch c10/cuda/CUDAFunctions.cpp", _OLD_DRIVER),
    _cuda(_UNFIT, NODE, "CUDA driver version is insufficient for CUDA runtime version",
          "cudaErrorInsufficientDriver", 35, _OLD_DRIVER),
    _cuda(_UNFIT, NODE, "API call is not supported in the installed CUDA driver",
          "cudaErrorCallRequiresNewerDriver", 36, _OLD_DRIVER),
    _cuda(_UNFIT, NODE, "the provided PTX was compiled with an unsupported toolchain", "cudaErrorUnsupportedPtxVersion",
          222, _OLD_DRIVER),
    _cuda(_UNFIT, NODE, "forward compatibility was attempted on non supported HW",
          "cudaErrorCompatNotSupportedOnDevice", 804, _OLD_DRIVER),
    _cuda(_UNFIT, NODE, "no kernel image is available for execution on the device",
          "cudaErrorNoKernelImageForDevice", 209, _OLD_GPU),
    _row(_UNFIT, NODE, TORCH_CUDA, "CUBLAS_STATUS_ARCH_MISMATCH",
         "CUDA error: CUBLAS_STATUS_ARCH_MISMATCH when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
         "torch aten/src/ATen/cuda/CUDABlas.cpp", _OLD_GPU),
    _row(_UNFIT, NODE, "transformers/training_args.py", ("You need Ampere+ GPU with cuda>=11.0", "bf16"),
         "Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the model on CPU. You "
         "need Ampere+ GPU with cuda>=11.0.", "transformers 5.23 training_args.py:1781", _NO_BFLOAT16),
    _row(_UNFIT, NODE, TORCH_CUDA, "FlashAttention only supports Ampere GPUs or newer",
         "FlashAttention only supports Ampere GPUs or newer.",
         "torch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp", _NO_BFLOAT16),
    _row(_UNFIT, NODE, "accelerate/state.py", "doesn't support faster communication broadband via P2P or IB",
         "Using RTX 4000 series doesn't support faster communication broadband via P2P or IB. Please set "
         '`NCCL_P2P_DISABLE="1"` and `NCCL_IB_DISABLE="1" or use `accelerate launch` which will do this automatically.',
         "accelerate 1.15 state.py:321", _NO_PEER_COPIES),
    _row(_UNFIT, NODE, NCCL, "Duplicate GPU detected",
         _nccl(_USAGE, "Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"),
         "NCCL 2.29.7 src/init.cc:974; verl-project/verl#161", _SHARED_GPU),
    _row(_UNFIT, NODE, NCCL, "Mismatched NCCL version detected",
         _nccl(_USAGE, "Mismatched NCCL version detected : rank 0 version 22907 rank 1 version 22703"),
         "NCCL 2.29.7 src/init.cc:966", _IMAGE),
)  # fmt: skip

_HARDWARE = (
    _cuda(_FAULT, OWN, "uncorrectable ECC error encountered", "cudaErrorECCUncorrectable", 214),
    _cuda(_FAULT, OWN, "uncorrectable NVLink error detected during the execution", "cudaErrorNvlinkUncorrectable", 220),
    _cuda(_FAULT, NODE, "Invalid access of peer GPU memory over nvlink or a hardware error", "cudaErrorContained", 226),
    _row(_FAULT, OWN, CUDART, ("unknown error", "CUDA error"), "CUDA error: unknown error",
         "CUDA runtime 13.0, cudaErrorUnknown (999)"),
    _row(_FAULT, OWN, "", "fallen off the bus",
         "NVRM: Xid (PCI:0000:44:00): 79, pid=1818990, name=python3, GPU has fallen off the bus.",
         "driver, Xid 79; NVIDIA/open-gpu-kernel-modules#888"),
    _row(_FAULT, OWN, "", ("NVRM: Xid", "): 48,"),
         "NVRM: Xid (PCI:0000:9b:00): 48, pid=1234, name=python3, An uncorrectable double bit error (DBE) has been "
         "detected on GPU", "driver, Xid 48; docs.nvidia.com/deploy/xid-errors"),
    _row(_FAULT, OWN, "", ("NVRM: Xid", "ECC error"),
         "NVRM: Xid (PCI:0000:9b:00): 94, pid=1234, name=python3, Contained ECC error",
         "driver, Xid 94 and 95; leptonai/gpud#1174"),
    _row(_FAULT, OWN, "", ("NVRM: Xid", "): 74,"),
         "NVRM: Xid (PCI:0000:3b:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 3",
         "driver, Xid 74; docs.nvidia.com/deploy/xid-errors"),
    _row(_FAULT, OWN, "", ("NVRM: Xid", "): 119,"),
         "NVRM: Xid (PCI:0000:3b:00): 119, pid=1234, name=python3, Timeout after 6s of waiting for RPC response from "
         "GPU0 GSP!", "driver, Xid 119; NVIDIA/open-gpu-kernel-modules#446"),
    _row(_FAULT, OWN, "", "GPU is lost",
         "Unable to determine the device handle for GPU 0000:02:00.0: GPU is lost. Reboot the system to recover this "
         "GPU",
         "NVML, NVML_ERROR_GPU_IS_LOST; JosephKJ/OWOD#81"),
)  # fmt: skip

_UNAVAILABLE = (
    _cuda(_AWAY, NODE, "system not yet initialized", "cudaErrorSystemNotReady", 802, _FABRIC_MANAGER),
    _cuda(_AWAY, NODE, "system has unsupported display driver / cuda driver combination",
          "cudaErrorSystemDriverMismatch", 803, _RELOADED_DRIVER),
    _row(_AWAY, NODE, "", "Driver/library version mismatch", "Failed to initialize NVML: Driver/library version "
    "mismatch",
         "NVML; NVIDIA/nvidia-container-toolkit#171", _RELOADED_DRIVER),
    _cuda(_AWAY, NODE, "no CUDA-capable device is detected", "cudaErrorNoDevice", 100),
    _cuda(_AWAY, NODE, "CUDA-capable device(s) is/are busy or unavailable", "cudaErrorDevicesUnavailable", 46),
    _cuda(_AWAY, NODE, "invalid device ordinal", "cudaErrorInvalidDevice", 101),
    _cuda(_AWAY, NODE, "peer access is not supported between these two devices", "cudaErrorPeerAccessUnsupported", 217),
    _cuda(_AWAY, NODE, "peer mapping resources exhausted", "cudaErrorTooManyPeers", 711),
    _row(_AWAY, NODE, CUDART, ("initialization error", "CUDA error"), "CUDA error: initialization error",
         "CUDA runtime 13.0, cudaErrorInitializationError (3)"),
    _row(_AWAY, NODE, C10_CUDA, "No CUDA GPUs are available", "No CUDA GPUs are available",
         "torch c10/cuda/CUDAFunctions.cpp"),
    _row(_AWAY, NODE, C10_CUDA, "Found no NVIDIA driver on your system",
         "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
         "http://www.nvidia.com/Download/index.aspx", "torch c10/cuda/CUDAFunctions.cpp"),
    _row(_AWAY, NODE, C10_CUDA, "CUDA driver initialization failed",
         "CUDA driver initialization failed, you might not have a CUDA gpu.", "torch c10/cuda/CUDAFunctions.cpp"),
    _row(_AWAY, NODE, C10_CUDA, "CUDA unknown error - this may be due to an incorrectly set up environment",
         "CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env variable "
         "CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero.",
         "torch c10/cuda/CUDAFunctions.cpp"),
    _row(_AWAY, NODE, "transformers/training_args.py", "Your setup doesn't support bf16/gpu",
         "Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train the model on CPU.",
         "transformers 5.23 training_args.py:1779"),
    _row(_AWAY, NODE, "", ("libcuda.so", "cannot open shared object file"),
         "libcuda.so.1: cannot open shared object file: No such file or directory", "ld.so; NVIDIA/nvidia-docker#828",
         "The container has no driver: install the NVIDIA container toolkit on the node and make its runtime the "
         "default, or name it in runtimeClassName of the runtime."),
)  # fmt: skip

_KERNELS = (
    _cuda(FailureClass.BAD_DATA, OWN, "device-side assert triggered", "cudaErrorAssert", 710, _VOCABULARY),
    _cuda(_KERNEL, OWN, "an illegal memory access was encountered", "cudaErrorIllegalAddress", 700),
    _cuda(_KERNEL, OWN, "unspecified launch failure", "cudaErrorLaunchFailure", 719),
    _cuda(_KERNEL, OWN, "misaligned address", "cudaErrorMisalignedAddress", 716),
    _cuda(_KERNEL, OWN, "an illegal instruction was encountered", "cudaErrorIllegalInstruction", 715),
    _cuda(_KERNEL, OWN, "hardware stack error", "cudaErrorHardwareStackError", 714),
    _cuda(_KERNEL, OWN, "the launch timed out and was terminated", "cudaErrorLaunchTimeout", 702),
    _row(_KERNEL, OWN, TORCH_CUDA, "CUBLAS_STATUS_EXECUTION_FAILED",
         "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb, m, n, k)`",
         "torch aten/src/ATen/cuda/CUDABlas.cpp"),
    _row(_KERNEL, OWN, CUDNN, "CUDNN_STATUS_EXECUTION_FAILED", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
         "cuDNN 9.20, cudnnGetErrorString"),
    _row(_KERNEL, OWN, TORCH_CUDA, "ProcessGroupNCCL's watchdog got stuck for",
         "ProcessGroupNCCL's watchdog got stuck for 480 seconds without making progress in monitoring enqueued "
         "collectives. "
         "This typically indicates a NCCL/CUDA API (e.g., CudaEventDestroy) hang blocking the watchdog",
         "torch torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp; verl-project/verl#1158"),
    _row(_KERNEL, OWN, TORCH_CUDA, "ncclUnhandledCudaError", _nccl(_CUDA, "Cuda failure 'invalid argument'"),
         "torch torch/csrc/distributed/c10d/NCCLUtils.cpp; NCCL 2.29.7 src/init.cc:3063"),
)  # fmt: skip

_PEERS = (
    _row(_LOST, PEER, TORCH_CUDA, "Watchdog caught collective operation timeout",
         "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6463, OpType=ALLREDUCE, NumelIn=1, "
         "NumelOut=1, Timeout(ms)=600000) ran for 600017 milliseconds before timing out.",
         "torch torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp", _SLOW_PEER),
    _row(_LOST, PEER, NCCL, "exceeded error retry count after",
         _nccl(_REMOTE, "socketPollConnect: connect to 10.0.0.7<41233> returned Connection refused, exceeded error "
                        "retry count after 35 attempts"), "NCCL 2.29.7 src/os/linux.cc:221", _NETWORK),
    _row(_LOST, PEER, NCCL, "Connection closed by remote peer",
         _nccl(_REMOTE, "socketProgress: Connection closed by remote peer run-1-1.run<45710>"),
         "NCCL 2.29.7 src/misc/socket.cc:35", _NETWORK),
    _row(_LOST, PEER, NCCL, "NET/IB: Got completion from peer",
         _nccl(_REMOTE, "NET/IB: Got completion from peer 10.0.0.7<53908> with status=IBV_WC_RETRY_EXC_ERR(12) "
               "opcode=IBV_WC_SEND(0) vendor_err=129  hca mlx5_0"),
         "NCCL 2.29.7 src/transport/net_ib/p2p.cc:651; NVIDIA/nccl#1405", _NETWORK),
    _row(_LOST, PEER, NCCL, "remote process exited or there was a network error",
         "NCCL error: remote process exited or there was a network error, NCCL version 2.29.7",
         "NCCL 2.29.7 src/init.cc:3068", _NETWORK),
    _row(_LOST, PEER, TORCH_CUDA, "NCCL communicator was aborted on rank", "NCCL communicator was aborted on rank 3.",
         "torch torch/csrc/distributed/c10d/NCCLUtils.cpp", _NETWORK),
    _row(_LOST, PEER, TORCH_CPU, "Connection closed by peer ",
         "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.7]:37511",
         "gloo transport/tcp/pair.cc, as torch 2.13 has it", _NETWORK),
    _row(_LOST, PEER, TORCH_CPU, "Timed out waiting ",
         "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv "
         "operation to complete", "gloo transport/tcp/unbound_buffer.cc, as torch 2.13 has it", _SLOW_PEER),
    _row(_LOST, PEER, TORCH_CPU, "Gloo connectFullMesh failed with",
         "Gloo connectFullMesh failed with [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:144] no error",
         "gloo rendezvous/context.cc, as torch 2.13 has it", _NETWORK),
    _row(_LOST, PEER, TORCH_CPU, "The client socket has timed out after",
         "The client socket has timed out after 60000ms while trying to connect to (run-1-0.run, 29500).",
         "torch torch/csrc/distributed/c10d/socket.cpp", _NETWORK),
)  # fmt: skip

GPU_ERRORS: tuple[GpuError, ...] = tuple(chain(_MEMORY, _LIMITS, _MISFITS, _HARDWARE, _UNAVAILABLE, _KERNELS, _PEERS))


def find_gpu_error(text: str) -> GpuError | None:
    """The row of the table for ``text``, an exception's or the last lines of a process; ``None`` where none fits."""
    return next((row for row in GPU_ERRORS if row.fits(text)), None)
