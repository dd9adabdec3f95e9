"""Where the adapter goes, when it is good enough to go there, and who else is told of the run."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from lora_api import patterns
from lora_api._base import ApiModel, CelRule
from lora_api.environment import SECRET_KEYS
from lora_api.pods import SecretRef

StoreUri = Annotated[str, StringConstraints(pattern=patterns.STORE_URI, max_length=512)]
LabelName = Annotated[str, StringConstraints(pattern=patterns.LABEL_NAME, min_length=1, max_length=63)]
WebUri = Annotated[str, StringConstraints(pattern=patterns.WEB_URI, max_length=512)]
TrackingName = Annotated[str, StringConstraints(min_length=1, max_length=128)]
ServedDtype = Literal["bfloat16", "float32"]
GateBase = Literal["served", "training"]


class Gate(ApiModel):
    """What an adapter must reach to be published. One that does not ends the run with GateRefused."""

    min_eval_loss_improvement: float | None = Field(
        None,
        ge=0.0,
        le=1000.0,
        description="Least difference of the evaluation loss (nats per token) before training and after it.",
    )
    max_eval_loss: float | None = Field(
        None, gt=0.0, le=1000.0, description="Largest evaluation loss (nats per token) after training."
    )
    base: GateBase | None = Field(
        None,
        description="Base model that the losses are of: as it is served (publish.servedDtype) or as it is trained on. "
        "Default: served, and training where that does not fit.",
    )

    cel_rules = (
        CelRule(
            rule="has(self.minEvalLossImprovement) || has(self.maxEvalLoss)",
            message="set minEvalLossImprovement, maxEvalLoss or both",
            field_path=".maxEvalLoss",
        ),
    )


def store_rules(field: str) -> tuple[CelRule, ...]:
    """What a store must look like, for a field that may be absent."""
    return (
        CelRule(
            rule=f"!has(self.{field}) || self.{field}.matches('^s3://[a-z0-9][a-z0-9.-]*[a-z0-9](/[!-.0-~]+)*/?$') && "
            f"!self.{field}.matches('/[.][.]?(/|$)')",
            message="must be s3://BUCKET/PREFIX, without spaces, and may not have . or .. as a part",
            field_path=f".{field}",
        ),
    )


class Publish(ApiModel):
    """Where the adapter goes: STORE/NAMESPACE/NAME/sha256-DIGEST/."""

    store: StoreUri | None = Field(
        None,
        description="s3://BUCKET/PREFIX, on any store with the S3 API. Default: that of the runtime.",
    )
    name: LabelName | None = Field(
        None, description="Name of the adapter in the store. Its versions count up. Default: the name of this resource."
    )
    sample_prompts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=4096)]], Field(max_length=16)
    ] = Field(
        [],
        description="Prompts that are answered before and after training, for the report. Default: evaluation records.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    gate: Gate | None = Field(None, description="What the adapter must reach to be published. Default: nothing.")
    served_dtype: ServedDtype | None = Field(
        None,
        description="Type of the base weights that the adapter is going to be served on, and is evaluated on too. "
        "Default: "
        "bfloat16 on GPUs, float32 on CPUs.",
    )
    merge_base: bool = Field(
        default=False,
        description="Also publish the whole model with the adapter merged into its original, unquantized weights.",
    )

    cel_rules = store_rules("store")


def choose_served_dtype(publish: Publish, gpus_per_node: int) -> ServedDtype:
    """The type of the base weights that an adapter is evaluated on as it is served.

    On GPUs bfloat16, which is what inference servers load models in. On CPUs float32: products in bfloat16 are slow
    there, and vLLM 0.32 wrote wrong text with them on the one that it was tried on.
    """
    return publish.served_dtype or ("bfloat16" if gpus_per_node else "float32")


class PublishTo(Publish):
    """Publish once it is settled where: what the trainer gets."""

    store: StoreUri


class Credentials(ApiModel):
    """How the pods reach the store and the model hub. The operator itself never reads the Secret."""

    secret_ref: SecretRef = Field(
        description=f"Secret. These keys of it become variables of the pods: {', '.join(SECRET_KEYS)}. "
        "Others are left alone."
    )


class WandB(ApiModel):
    """Weights & Biases. Its key is WANDB_API_KEY in the Secret of credentials."""

    project: TrackingName = Field(description="Project to log to.")
    entity: TrackingName | None = Field(None, description="User or team of the project. Default: that of the key.")
    base_url: WebUri | None = Field(
        None, description="Address of a server of your own. endpoints.tracking of the runtime has to list it."
    )


class MLflow(ApiModel):
    """MLflow. MLFLOW_TRACKING_TOKEN, or USERNAME and PASSWORD, come from the Secret of credentials."""

    tracking_uri: WebUri = Field(
        description="Address of the tracking server. endpoints.tracking of the runtime has to list it."
    )
    experiment: TrackingName = Field(description="Experiment to log to. It is created if it is not there.")


class Tracking(ApiModel):
    """Who else is told of the run. A tracker that is down never fails a run."""

    wandb: WandB | None = Field(None, description="Log to Weights & Biases.")
    mlflow: MLflow | None = Field(None, description="Log to MLflow.")
    tensorboard: bool = Field(default=False, description="Publish TensorBoard's event files with the adapter.")
