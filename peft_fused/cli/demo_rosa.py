"""How often ROSA draws a subspace, and what that costs."""

from . import demo_extra


class Extra(demo_extra.Extra):
    def measure(self, models, batches, advance):
        return {"resample_every": self.model.peft_config["default"].resample_every}

    @staticmethod
    def combine(seeds, spread):
        return {"resample_every": seeds[0]["resample_every"]}

    @staticmethod
    def notes(found, baseline):
        share = found["step_ms_mean"] / baseline["step_ms_mean"]
        return [
            f"ROSA trains each subspace for {found['resample_every']} steps. A median leaves the steps out that draw a "
            f"new one; with them its mean step takes {share:.2f} of PEFT's"
        ]
