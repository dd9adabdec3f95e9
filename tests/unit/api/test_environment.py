"""The lists of names: nothing on them is known to load code, to name a file or a server, or to be a secret."""

import pytest

from lora_api.endpoints import allows_tracker
from lora_api.environment import HARMLESS, SECRET_KEYS, SECRETS, is_harmless

# From the documentation of each library: what loads code, names a file or a directory, or names a server.
HARMFUL = [
    "HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH",
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_ALLOW_CODE_EVAL", "HF_XET_CACHE",
    "HF_HUB_ENABLE_HF_TRANSFER", "NCCL_CONF_FILE", "NCCL_TOPO_FILE", "NCCL_TOPO_DUMP_FILE", "NCCL_GRAPH_FILE",
    "NCCL_GRAPH_DUMP_FILE", "NCCL_DEBUG_FILE", "NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_PROFILER_PLUGIN",
    "NCCL_ENV_PLUGIN", "NCCL_GIN_PLUGIN", "NCCL_NET", "NCCL_COMM_ID", "NCCL_RAS_ADDR", "NCCL_HOSTID",
    "CUDA_INJECTION64_PATH", "CUDA_INJECTION32_PATH", "CUDA_CACHE_PATH", "CUDA_COREDUMP_FILE", "CUDA_LOG_FILE",
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_HOME", "CUDA_PATH", "OMP_TOOL", "OMP_TOOL_LIBRARIES", "OMP_TOOL_VERBOSE_INIT",
    "OMP_DEBUG", "UCX_MODULE_DIR", "UCX_LOG_FILE", "UCX_CONFIG_DIR", "FI_PROVIDER_PATH", "FI_CONF_PATH",
    "RDMAV_DRIVERS", "TORCH_HOME", "TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_TRACE", "TORCH_EXTENSIONS_DIR",
    "TORCH_COMPILE_DEBUG_DIR", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE",
    "PYTORCH_KERNEL_CACHE_PATH", "LORA_WORK", "LORA_STATE_DIR", "LORA_TERMINATION_LOG", "PYTHONPATH", "LD_PRELOAD",
    "LD_LIBRARY_PATH", "PATH", "HTTPS_PROXY", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_PROFILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI", "MASTER_ADDR", "RANK",
]  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_name_is_not_on_the_list(name: str) -> None:
    assert not is_harmless(name)


def test_each_name_says_why_it_is_harmless() -> None:
    assert all(reason and not reason.endswith(".") for reason in HARMLESS.values())
    assert is_harmless("NCCL_SOCKET_IFNAME")
    assert not [
        name for name in HARMLESS if name.endswith(("_FILE", "_PATH", "_DIR", "_PLUGIN", "_HOME", "_URL", "_ADDR"))
    ]


def test_no_secret_may_be_written_into_a_manifest() -> None:
    assert not set(SECRET_KEYS) & set(HARMLESS)
    assert set(SECRET_KEYS) - set(SECRETS) == {"AWS_REGION"}


TRACKERS = ["https://mlflow.example.org/team", "http://wandb.svc:8080/"]


@pytest.mark.parametrize(
    ("uri", "want"),
    [
        ("https://mlflow.example.org/team", True),
        ("https://mlflow.example.org/team/", True),
        ("https://mlflow.example.org/team/a", True),
        ("http://wandb.svc:8080", True),
        ("https://api.wandb.ai", True),
        ("https://mlflow.example.org/teams", False),
        ("https://mlflow.example.org/team/../other", False),
        ("https://mlflow.example.org/team/%2E%2e/other", False),
        ("https://mlflow.example.org/team/..%2fother", False),
        ("https://mlflow.example.org/team/..", False),
        ("https://mlflow.example.org", False),
        ("http://mlflow.example.org/team", False),
        ("http://wandb.svc:8080@attacker.test", False),
        ("http://wandb.svc:80800", False),
        ("https://api.wandb.ai.attacker.test", False),
    ],
)
def test_a_tracker_is_allowed_by_whole_parts(uri: str, want: bool) -> None:
    assert allows_tracker(TRACKERS, uri) == want
