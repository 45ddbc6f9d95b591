"""Says in advance what a pipelined run will cost: measure layers once, predict layouts, choose."""

from penstock.pipe.planner.bounds import best_bounds
from penstock.pipe.planner.measure import Flow, measure_layers, run_through
from penstock.pipe.planner.plan import TRAINABLE, WHOLE, Plan, plan, plan_bounds
from penstock.pipe.planner.predict import Prediction, least_seconds, predict
from penstock.pipe.planner.profile import LayerCosts, Profile, load_profiles, save_profiles
from penstock.pipe.planner.report import layer_lines, plan_lines
from penstock.pipe.planner.selective import select_recomputed
from penstock.pipe.planner.stages import StageCosts, kept_bytes

__all__ = [
    "TRAINABLE",
    "WHOLE",
    "Flow",
    "LayerCosts",
    "Plan",
    "Prediction",
    "Profile",
    "StageCosts",
    "best_bounds",
    "kept_bytes",
    "layer_lines",
    "least_seconds",
    "load_profiles",
    "measure_layers",
    "plan",
    "plan_bounds",
    "plan_lines",
    "predict",
    "run_through",
    "save_profiles",
    "select_recomputed",
]
