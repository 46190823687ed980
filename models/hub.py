"""Models of the registry on the Hugging Face Hub, or in folders of its format."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dnw_graph import cost
from models.registry import create_model

try:
    from huggingface_hub import ModelCard, PyTorchModelHubMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'HubModel needs huggingface_hub: pip install "dnw-graph[hub]"'
    ) from error

CARD = """---
{{ card_data }}
---

# {{ name }}

An image classifier whose wiring was learned as in
[Discovering Neural Wirings](https://arxiv.org/abs/1906.00586), with dnw-graph.

```python
from models.hub import HubModel

model = HubModel.from_pretrained("this repository, or a folder").eval()
logits = model(images)  # [B, 3, {{ size }}, {{ size }}], normalised with model.mean and model.std
```

| | |
| --- | --- |
{% for fact, value in facts.items() -%}
| {{ fact }} | {{ value }} |
{% endfor %}
"""


class HubModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="dnw-graph",
    license="apache-2.0",
    tags=["dnw-graph", "neural-architecture-search", "sparsity"],
    pipeline_tag="image-classification",
    paper_url="https://arxiv.org/abs/1906.00586",
    model_card_template=CARD,
):
    """A model of the registry with the methods of the Hugging Face Hub.

    ``save_pretrained(folder)`` writes ``config.json``, ``model.safetensors`` and a model card,
    ``HubModel.from_pretrained(folder or repository)`` reads them, and ``push_to_hub(repository)``
    uploads them. Pass ``model_card_kwargs={"facts": {"accuracy": "..."}}`` to add to the card.

    Args:
        name: Name of the model, one of :func:`list_models`.
        classes: Names of the classes, by label.
        mean: Mean of each channel of its images, for pixels from 0 to 1.
        std: Standard deviation of each channel.
        options: Options of the model, as for :func:`create_model`.

    Attributes:
        network: The model itself.

    Raises:
        ValueError: If the name or an option is unknown, or an option is out of range.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.name, self.options = name, options
        self.classes, self.mean, self.std = classes, mean, std
        self.network = create_model(name, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        logits: Tensor = self.network(x)
        return logits

    def generate_model_card(
        self, facts: Mapping[str, object] | None = None, **others: Any
    ) -> ModelCard:
        """Return the model card.

        Args:
            facts: What to add to the card, by name, such as the accuracy and the data.
            others: Values of further fields of the card's template.
        """
        size = self.options.get("image_size", 224)
        counted = cost(self.network, size)
        default = {
            "model": self.name,
            "options": ", ".join(f"{name} {value}" for name, value in self.options.items()),
            "multiply-adds per image": f"{counted.macs:,}",
            "parameters": f"{counted.parameters:,}",
            "real edges": f"{counted.real_edges:,} of {counted.candidate_edges:,}",
        }
        return super().generate_model_card(
            name=self.name, size=size, facts={**default, **(facts or {})}, **others
        )
