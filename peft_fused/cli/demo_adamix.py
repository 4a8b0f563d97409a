"""AdaMix by random experts, beside their average."""

import statistics

from torch import nn

import peft_fused

from . import demo_extra

RANDOM_ROUTES = 8


class Extra(demo_extra.Extra):
    def measure(self, models, batches, advance):
        from .demo_train import accuracy

        routes = random_route_accuracies(self.model, batches, accuracy)
        return {"merged_accuracy": accuracy(self.model, batches), "random_route_accuracies": routes}

    @staticmethod
    def combine(seeds, spread):
        routes = zip(*(seed["random_route_accuracies"] for seed in seeds), strict=True)
        return {
            "merged_accuracy": statistics.fmean(seed["merged_accuracy"] for seed in seeds),
            "random_route_accuracies": [statistics.fmean(route) for route in routes],
        }

    @staticmethod
    def notes(found, baseline):
        routes = found["random_route_accuracies"]
        return [
            f"AdaMix's accuracy is that of its experts averaged, {found['merged_accuracy']:.3f}; {len(routes)} random "
            f"routes have {statistics.fmean(routes):.3f} on average, {min(routes):.3f} to {max(routes):.3f}"
        ]


def random_route_accuracies(model: nn.Module, batches: list[dict], accuracy) -> list[float]:
    """Accuracies of an AdaMix model by RANDOM_ROUTES draws of its experts, in place of their average."""
    found = []
    for index in range(RANDOM_ROUTES):
        peft_fused.set_adamix_routing(model, "random", index=index)
        found.append(accuracy(model, batches))
    peft_fused.set_adamix_routing(model, "merged")
    return found
