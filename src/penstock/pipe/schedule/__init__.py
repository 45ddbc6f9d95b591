"""Schedules are data: pure functions make them, passes place communication, validate, simulate and draw them."""

from penstock.pipe.schedule.action import COMMUNICATION_OPS, COMPUTE_OPS, Action
from penstock.pipe.schedule.actions import Actions
from penstock.pipe.schedule.communicate import Channel, channel_of, place_communication, text_with_communication
from penstock.pipe.schedule.costs import Costs
from penstock.pipe.schedule.draw import draw
from penstock.pipe.schedule.dualpipe_v import dualpipe_v
from penstock.pipe.schedule.forward_only import forward_on, forward_only
from penstock.pipe.schedule.gpipe import gpipe
from penstock.pipe.schedule.head_start import head_start
from penstock.pipe.schedule.interleaved_1f1b import interleaved_1f1b
from penstock.pipe.schedule.looped_bfs import looped_bfs
from penstock.pipe.schedule.memory import peak_memory
from penstock.pipe.schedule.names import SCHEDULES, BuiltIn, get_schedule
from penstock.pipe.schedule.one_f_one_b import one_f_one_b
from penstock.pipe.schedule.picture import html, svg
from penstock.pipe.schedule.placement import PLACEMENTS, get_placement, loop, v_shape
from penstock.pipe.schedule.png import png
from penstock.pipe.schedule.problem import Problem
from penstock.pipe.schedule.schedule import Schedule, ScheduleError
from penstock.pipe.schedule.schedule_file import load_schedule, save_schedule
from penstock.pipe.schedule.search import Found, search
from penstock.pipe.schedule.seq1f1b import seq1f1b
from penstock.pipe.schedule.simulate import simulate
from penstock.pipe.schedule.timeline import Event, Timeline
from penstock.pipe.schedule.timeline_file import load_timeline, save_timeline, timeline_from_json, timeline_to_json
from penstock.pipe.schedule.trace import save_trace, trace_events
from penstock.pipe.schedule.v_half import v_half
from penstock.pipe.schedule.v_min import v_min
from penstock.pipe.schedule.validate import ScheduleFacts, needed_capacity, validate
from penstock.pipe.schedule.zb_h1 import zb_h1
from penstock.pipe.schedule.zb_h2 import zb_h2
from penstock.pipe.schedule.zb_v import zb_v

__all__ = [
    "COMMUNICATION_OPS",
    "COMPUTE_OPS",
    "PLACEMENTS",
    "SCHEDULES",
    "Action",
    "Actions",
    "BuiltIn",
    "Channel",
    "Costs",
    "Event",
    "Found",
    "Problem",
    "Schedule",
    "ScheduleError",
    "ScheduleFacts",
    "Timeline",
    "channel_of",
    "draw",
    "dualpipe_v",
    "forward_on",
    "forward_only",
    "get_placement",
    "get_schedule",
    "gpipe",
    "head_start",
    "html",
    "interleaved_1f1b",
    "load_schedule",
    "load_timeline",
    "loop",
    "looped_bfs",
    "needed_capacity",
    "one_f_one_b",
    "peak_memory",
    "place_communication",
    "png",
    "save_schedule",
    "save_timeline",
    "save_trace",
    "search",
    "seq1f1b",
    "simulate",
    "svg",
    "text_with_communication",
    "timeline_from_json",
    "timeline_to_json",
    "trace_events",
    "v_half",
    "v_min",
    "v_shape",
    "validate",
    "zb_h1",
    "zb_h2",
    "zb_v",
]
