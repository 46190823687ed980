"""Frozen networks on the Hugging Face Hub, or in folders of its format."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dnw_graph.frozen import FrozenModel, load_frozen, save_frozen

try:
    from huggingface_hub import ModelHubMixin, hf_hub_download
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'HubFrozenModel needs huggingface_hub: pip install "dnw-graph[hub]"'
    ) from error

FILE = "model.frozen.safetensors"

CARD = """---
{{ card_data }}
---

# Frozen network with a learned wiring

```python
from dnw_graph.integrations.hub import HubFrozenModel

network = HubFrozenModel.from_pretrained("this repository, or a folder")
outputs = network(inputs)  # on a CPU, in float32; network.frozen.notes describes inputs and classes
```

{% for line in facts -%}
- {{ line }}
{% endfor %}
"""


class HubFrozenModel(
    ModelHubMixin,
    library_name="dnw-graph",
    license="apache-2.0",
    tags=["dnw-graph", "sparsity"],
    paper_url="https://arxiv.org/abs/1906.00586",
    model_card_template=CARD,
):
    """A frozen network with the methods of the Hugging Face Hub.

    ``save_pretrained(folder)`` writes the file of :func:`save_frozen` and a model card,
    ``HubFrozenModel.from_pretrained(folder or repository)`` reads them without executing code, and
    ``push_to_hub(repository)`` uploads them.

    Args:
        frozen: The network.
    """

    def __init__(self, frozen: FrozenModel) -> None:
        self.frozen = frozen

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output of the network."""
        output: Tensor = self.frozen(x)
        return output

    def generate_model_card(self, facts: list[str] | None = None, **others: Any) -> Any:
        """Return the model card.

        Args:
            facts: Lines to add to the card, such as the accuracy and the data.
            others: Values of further fields of the card's template.
        """
        edges = sum(graph.num_edges for graph in self.frozen.graphs)
        notes = [f"{name}: {text}" for name, text in self.frozen.notes.items()]
        lines = [f"{edges:,} real edges", *notes, *(facts or [])]
        return super().generate_model_card(facts=lines, **others)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_frozen(self.frozen, Path(save_directory) / FILE)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "HubFrozenModel":
        path = Path(model_id) / FILE
        if not Path(model_id).is_dir():
            names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
            passed = {name: options[name] for name in names if name in options}
            path = Path(hf_hub_download(repo_id=model_id, filename=FILE, **passed))
        return cls(load_frozen(path))
