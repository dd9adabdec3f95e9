"""A cluster that is not ours is used as it is."""

from pathlib import Path

import pytest

from devcluster.external import external_cluster
from devcluster.progress import DevclusterError


class TestExternalCluster:
    """``$KUBECONFIG`` decides whose cluster is used."""

    @pytest.fixture(autouse=True)
    def environment(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for name in (
            "KUBECONFIG",
            "LORA_S3_ENDPOINT",
            "LORA_S3_ENDPOINT_HOST",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))

    def test_unset_means_own(self) -> None:
        assert external_cluster() is None

    def test_the_kubeconfig_of_an_own_cluster_means_own(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "cache" / "clusters" / "dev" / "run" / "admin.kubeconfig"))
        assert external_cluster() is None

    def test_a_store_that_is_not_given_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KUBECONFIG", "/elsewhere/config")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        with pytest.raises(DevclusterError, match="set LORA_S3_ENDPOINT, AWS_SECRET_ACCESS_KEY too"):
            external_cluster()
