"""DyLoRA at every rank, beside a trained LoRA cut to it."""

from peft_fused.methods.dylora import evaluate_dylora_ranks

from . import demo_extra
from .output import show as show_table


class Extra(demo_extra.Extra):
    """Accuracy at every rank: DyLoRA set to it, and the trained LoRA cut to it."""

    @staticmethod
    def units(settings) -> int:
        return settings.rank

    def measure(self, models, batches, advance):
        from .demo_train import accuracy, truncated

        baseline, found = models["peft"], []
        for b in range(1, self.settings.rank + 1):
            with truncated(baseline, b):
                cut = accuracy(baseline, batches)
            own = evaluate_dylora_ranks(self.model, lambda model: accuracy(model, batches), [b])[b]
            found.append({"rank": b, "dylora": own, "lora_truncated": cut})
            advance()
        return {"ranks": found}

    @staticmethod
    def combine(seeds, spread):
        return {"ranks": [_rank(entries, spread) for entries in zip(*(seed["ranks"] for seed in seeds), strict=True)]}

    @staticmethod
    def show(console, found):
        ranks = [
            [str(entry["rank"]), *(demo_extra.cell(entry, key, ".3f") for key in ("dylora", "lora_truncated"))]
            for entry in found["ranks"]
        ]
        headings = ("b", "DyLoRA", "trained LoRA, cut")
        show_table(console, "accuracy when only the first b ranks are kept", headings, ranks)
        console.print("DyLoRA runs at its scale alpha / b; the cut LoRA keeps the alpha / r that it was trained with")

    @staticmethod
    def panel(axis, found):
        ranks = found["ranks"]
        for key, title in (("dylora", "DyLoRA, alpha / b"), ("lora_truncated", "trained LoRA, cut, alpha / r")):
            spread = [entry["std"][key] or 0.0 for entry in ranks]
            axis.errorbar([e["rank"] for e in ranks], [e[key] for e in ranks], spread, marker="o", label=title)
        axis.set(xlabel="ranks kept", ylabel="accuracy")
        axis.legend(fontsize="x-small")


def _rank(entries: tuple[dict, ...], spread) -> dict:
    spreads = {key: spread([entry[key] for entry in entries]) for key in ("dylora", "lora_truncated")}
    return {
        "rank": entries[0]["rank"],
        **{key: mean for key, (mean, _) in spreads.items()},
        "std": {key: std for key, (_, std) in spreads.items()},
    }
