"""The model card's YAML, checked by huggingface_hub, around the text that card_text makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spi_utils.errors import PublishError
from spi_utils.hub.card_facts import Facts, source_name
from spi_utils.hub.card_text import body
from spi_utils.hub.licences import KNOWN, Licence

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

TAGS = ["mixed-precision", "quantized", "spectral-analysis"]
BACKEND_TAGS = {
    "bitsandbytes": ["nf4", "bitsandbytes", "4-bit"],
    "compressed-tensors": ["compressed-tensors"],
}
# What a text's source is called on the Hub: (dataset id, config, split).
DATASETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}


def make_card(facts: Facts) -> ModelCard:
    """The card, its YAML built and checked by huggingface_hub.

    Raises:
        PublishError: the YAML doesn't survive being written and read again.
    """
    from huggingface_hub import ModelCard

    data = _data(facts)
    text = f"---\n{data.to_yaml()}\n---\n\n{body(facts)}\n"
    card = ModelCard(text)
    if card.data.to_dict() != data.to_dict():
        raise PublishError(
            f"the card's YAML reads back differently from what was written for {facts.repo_id}: "
            f"{data.to_dict()} became {card.data.to_dict()}. Please report this with the run's plan.json."
        )
    return card


def _data(facts: Facts) -> ModelCardData:
    """The YAML block as a ModelCardData."""
    from huggingface_hub import ModelCardData

    base: dict[str, Any] = (
        {"base_model": facts.base, "base_model_relation": "quantized"} if facts.base else {}
    )
    dataset = DATASETS.get(source_name(facts.evaluation["text"]))
    return ModelCardData(
        **base,
        **_licence(facts.licence),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*BACKEND_TAGS[facts.backend], *_tiers(facts), *TAGS, str(facts.plan["score"])],
        datasets=[dataset[0]] if dataset else None,
        model_name=facts.repo_id.split("/")[-1],
        eval_results=_eval_results(facts),
    )


def _licence(licence: Licence) -> dict[str, Any]:
    """A licence as the Hub wants it: one of its own ids, or "other" with a name and a link."""
    name = licence.id or "unknown"
    if name.lower() in KNOWN or name == "unknown":
        return {"license": name}
    return {"license": "other", "license_name": name, "license_link": "LICENSE"}


def _tiers(facts: Facts) -> list[str]:
    """ "int4" and "int8" where the plan has them."""
    used = facts.plan["formats"].values()
    return [tag for tag in ("int4", "int8") if any(str(fmt).startswith(tag) for fmt in used)]


def _eval_results(facts: Facts) -> list[EvalResult]:
    """model-index rows of the published model: perplexity and KL to its base."""
    from huggingface_hub import EvalResult

    text, plan = facts.evaluation["text"], facts.evaluation["variants"]["plan"]
    name = source_name(text)
    dataset, config, split = DATASETS.get(name, (name, None, None))
    metrics = {
        "perplexity": ("Perplexity", plan["perplexity"]),
        "kl_divergence": ("Mean KL to the 16-bit base, nats a token", plan["kl_mean"]),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=name,
            dataset_config=config,
            dataset_split=split,
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(value), 5),
            metric_args={"convention": str(text["convention"])},
        )
        for kind, (label, value) in metrics.items()
    ]
