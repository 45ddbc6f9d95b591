"""Schedules are data: pure functions make them, passes place communication, validate, simulate and draw them."""

from penstock.pipe.schedule.action import COMMUNICATION_OPS, COMPUTE_OPS, Action
from penstock.pipe.schedule.communicate import Channel, channel_of, place_communication
from penstock.pipe.schedule.costs import Costs
from penstock.pipe.schedule.draw import draw
from penstock.pipe.schedule.forward_only import forward_only
from penstock.pipe.schedule.gpipe import gpipe
from penstock.pipe.schedule.names import SCHEDULES, get_schedule
from penstock.pipe.schedule.one_f_one_b import one_f_one_b
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.simulate import simulate
from penstock.pipe.schedule.timeline import Event, Timeline
from penstock.pipe.schedule.validate import ScheduleFacts, validate

__all__ = [
    "COMMUNICATION_OPS",
    "COMPUTE_OPS",
    "SCHEDULES",
    "Action",
    "Channel",
    "Costs",
    "Event",
    "Schedule",
    "ScheduleError",
    "ScheduleFacts",
    "Timeline",
    "channel_of",
    "draw",
    "forward_only",
    "get_schedule",
    "gpipe",
    "one_f_one_b",
    "place_communication",
    "simulate",
    "validate",
]
