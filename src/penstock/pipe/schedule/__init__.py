"""Schedules are data: pure functions make them, passes place communication, validate, simulate and draw them."""

from penstock.pipe.schedule.action import COMMUNICATION_OPS, COMPUTE_OPS, Action
from penstock.pipe.schedule.communicate import Channel, channel_of, place_communication
from penstock.pipe.schedule.forward_only import forward_only
from penstock.pipe.schedule.gpipe import gpipe
from penstock.pipe.schedule.names import SCHEDULES, get_schedule
from penstock.pipe.schedule.one_f_one_b import one_f_one_b
from penstock.pipe.schedule.schedule import Schedule, ScheduleError

__all__ = [
    "COMMUNICATION_OPS",
    "COMPUTE_OPS",
    "SCHEDULES",
    "Action",
    "Channel",
    "Schedule",
    "ScheduleError",
    "channel_of",
    "forward_only",
    "get_schedule",
    "gpipe",
    "one_f_one_b",
    "place_communication",
]
