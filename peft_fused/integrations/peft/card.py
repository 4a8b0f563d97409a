"""What the card of a saved adapter says: that peft_fused makes its method known to PEFT, and how it is loaded."""

import os
import re

from .files import whole_files

CARD = "README.md"
NEW = "---\nlibrary_name: peft\n---\n"
START, END = "<!-- peft_fused -->", "<!-- end of peft_fused -->"
# Where PEFT's template leaves a place for it.
PLACE = "Use the code below to get started with the model.\n\n"
EMPTY = "[More Information Needed]"


def describe_method(folder: str | os.PathLike, config) -> None:
    """Writes the method of a saved config, and how it is loaded, into the card beside it, which is made if needed."""
    method = config.fused_type.value
    text = f"""{START}
This adapter is of the method {method}, `peft_fused.{type(config).__name__}`, which PEFT does not ship. Importing
`peft_fused` makes it known to PEFT's loaders; without that they end in `KeyError: '{method}'`.

```python
import peft_fused
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, folder)
```
{END}"""
    path = os.path.join(folder, CARD)
    card = NEW
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            card = file.read()
    if START in card and END in card:
        card = re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: text, card, flags=re.DOTALL)
    elif PLACE + EMPTY in card:
        card = card.replace(PLACE + EMPTY, PLACE + text, 1)
    else:
        card = f"{card.rstrip()}\n\n## How to load it\n\n{text}\n"
    with whole_files(folder, CARD) as whole, open(os.path.join(whole, CARD), "w", encoding="utf-8") as file:
        file.write(card)
