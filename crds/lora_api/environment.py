"""What may reach the environment of the pods, by whole names: from a run's manifest, and from its Secret.

Environment variables are how libraries are told to load plugins, to read files and to ask other servers. So a manifest
may set only names of which it is known that they do none of that (``HARMLESS``), and a Secret gives only the keys that
are meant for the pods (``SECRET_KEYS``). Anything else comes from a ClusterLoRARuntime, which administrators write.
"""

HARMLESS: dict[str, str] = {
    # NCCL: docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html. What names a file or a library (NCCL_TOPO_FILE,
    # NCCL_CONF_FILE, NCCL_NET_PLUGIN, NCCL_DEBUG_FILE), or an address to connect to (NCCL_COMM_ID), is not here.
    "NCCL_SOCKET_IFNAME": "names of network interfaces",
    "NCCL_SOCKET_FAMILY": "IPv4 or IPv6",
    "NCCL_SOCKET_NTHREADS": "a number of threads",
    "NCCL_NSOCKS_PERTHREAD": "a number of sockets",
    "NCCL_CROSS_NIC": "a switch: whether rings cross network adapters",
    "NCCL_OOB_NET_IFNAME": "names of network interfaces",
    "NCCL_IB_HCA": "names of InfiniBand adapters",
    "NCCL_IB_DISABLE": "a switch: InfiniBand or not",
    "NCCL_IB_GID_INDEX": "an index in the adapter's own table",
    "NCCL_IB_ADDR_FAMILY": "IPv4 or IPv6",
    "NCCL_IB_ADDR_RANGE": "which of the adapter's own addresses",
    "NCCL_IB_ROCE_VERSION_NUM": "a version of RoCE",
    "NCCL_IB_PKEY": "an index in the adapter's own table",
    "NCCL_IB_TIMEOUT": "a time",
    "NCCL_IB_RETRY_CNT": "a number of tries",
    "NCCL_IB_SL": "a service level",
    "NCCL_IB_TC": "a traffic class",
    "NCCL_IB_FIFO_TC": "a traffic class",
    "NCCL_IB_AR_THRESHOLD": "a size of messages",
    "NCCL_IB_ADAPTIVE_ROUTING": "a switch: adaptive routing or not",
    "NCCL_IB_QPS_PER_CONNECTION": "a number of queue pairs",
    "NCCL_IB_SPLIT_DATA_ON_QPS": "a switch: how data is spread over queue pairs",
    "NCCL_IB_PCI_RELAXED_ORDERING": "a switch: order of writes on PCI",
    "NCCL_IB_MERGE_NICS": "a switch: two ports as one adapter",
    "NCCL_DMABUF_ENABLE": "a switch: how an adapter reads a GPU's memory",
    "NCCL_NET_GDR_LEVEL": "a distance between adapter and GPU",
    "NCCL_NET_GDR_READ": "a switch: whether an adapter reads a GPU's memory",
    "NCCL_P2P_DISABLE": "a switch: direct access between GPUs or not",
    "NCCL_P2P_LEVEL": "a distance between GPUs",
    "NCCL_PXN_DISABLE": "a switch: other GPUs' adapters or not",
    "NCCL_SHM_DISABLE": "a switch: shared memory or not",
    "NCCL_NVLS_ENABLE": "a switch: sums in the NVLink switch or not",
    "NCCL_MNNVL_ENABLE": "a switch: NVLink between nodes or not",
    "NCCL_CUMEM_ENABLE": "a switch: how memory of the GPU is allocated",
    "NCCL_CUMEM_HOST_ENABLE": "a switch: how memory of the host is allocated",
    "NCCL_ALGO": "names of NCCL's own algorithms",
    "NCCL_PROTO": "names of NCCL's own protocols",
    "NCCL_BUFFSIZE": "a size of buffers",
    "NCCL_NTHREADS": "a number of threads",
    "NCCL_MIN_NCHANNELS": "a number of channels",
    "NCCL_MAX_NCHANNELS": "a number of channels",
    "NCCL_MIN_CTAS": "a number of thread blocks",
    "NCCL_MAX_CTAS": "a number of thread blocks",
    "NCCL_IGNORE_CPU_AFFINITY": "a switch: which cores NCCL's threads run on",
    "NCCL_DEBUG": "how much NCCL writes to the log",
    "NCCL_DEBUG_SUBSYS": "which parts of NCCL write to the log",
    # Gloo and libfabric: fi_provider(7). FI_PROVIDER_PATH, a directory of libraries, is not here.
    "GLOO_SOCKET_IFNAME": "names of network interfaces",
    "FI_PROVIDER": "names of libfabric's own providers",
    "FI_EFA_USE_DEVICE_RDMA": "a switch: RDMA of the adapter or not",
    "FI_LOG_LEVEL": "how much libfabric writes to the log",
    "RDMAV_FORK_SAFE": "a switch: what a fork does to registered memory",
    # Threads. OMP_TOOL_LIBRARIES, which loads libraries, is not here.
    "OMP_NUM_THREADS": "a number of threads",
    "OMP_PROC_BIND": "which cores threads stay on",
    "OMP_PLACES": "which cores threads stay on",
    "OMP_WAIT_POLICY": "whether waiting threads spin",
    "MKL_NUM_THREADS": "a number of threads",
    "TOKENIZERS_PARALLELISM": "a switch: threads in tokenizers or not",
    # CUDA: its programming guide. CUDA_INJECTION64_PATH, a library, and CUDA_CACHE_PATH, a directory, are not here.
    "CUDA_DEVICE_MAX_CONNECTIONS": "a number of queues",
    "CUDA_LAUNCH_BLOCKING": "a switch: whether kernels are waited for",
    "CUDA_MODULE_LOADING": "when kernels are loaded: EAGER or LAZY",
    # PyTorch: its pages on CUDA semantics and on ProcessGroupNCCL. TORCH_LOGS, which looks for modules, and
    # TORCH_LOGS_OUT, a file, are not here.
    "PYTORCH_ALLOC_CONF": "options of the allocator, none of which names a file",
    "PYTORCH_CUDA_ALLOC_CONF": "the same under its older name",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "a number: what happens at a time-out",
    "TORCH_NCCL_BLOCKING_WAIT": "a switch: how results are waited for",
    "TORCH_NCCL_ENABLE_MONITORING": "a switch: whether the watchdog is watched",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "a time",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "a number of events",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "a switch: when memory is free again",
    "TORCH_DISTRIBUTED_DEBUG": "how much is checked and logged",
    "TORCH_CPP_LOG_LEVEL": "how much is logged",
    "TORCH_SHOW_CPP_STACKTRACES": "how much is logged",
    # The hub's client: huggingface.co/docs/huggingface_hub/package_reference/environment_variables. HF_HOME and the
    # caches, which are directories, HF_ENDPOINT, a server, and HF_HUB_OFFLINE, which makes a cache a source, are not.
    "HF_HUB_DOWNLOAD_TIMEOUT": "a time",
    "HF_HUB_ETAG_TIMEOUT": "a time",
    "HF_HUB_DISABLE_XET": "a switch: how files come from the hub",
    "HF_XET_HIGH_PERFORMANCE": "a switch: how many connections to the hub",
    # The trainer's own. Where it writes (LORA_WORK, LORA_STATE_DIR, LORA_TERMINATION_LOG) is the operator's.
    "LORA_SPEED": "names of the trainer's own levers (docs/speed.md)",
    "LORA_RENDEZVOUS_SECONDS": "a time",
    "LORA_STORE_RETRY_SECONDS": "a time",
    "LORA_STORE_TIMEOUT_SECONDS": "a time",
    "LORA_PEER_GRACE_SECONDS": "a time",
    "LORA_STOP_GRACE_SECONDS": "a time",
    "LORA_PUBLISH_SECONDS": "a time",
    "LORA_TRACKING_SECONDS": "a time",
}
"""What ``podTemplate.env`` of a run may set, and why that is harmless: a value is a number, a switch or a name that the
library knows itself. Each was looked up in its library's documentation."""

SECRET_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
)
"""The keys of the Secret of ``credentials`` that become environment variables of the pods. No other does."""

SECRETS = tuple(key for key in SECRET_KEYS if key != "AWS_REGION")
"""Those that nobody may write into a manifest, of a run or of a runtime: everybody can read it."""


def is_harmless(name: str) -> bool:
    """Whether a run may set the variable ``name`` itself."""
    return name in HARMLESS
