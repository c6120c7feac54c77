"""The panels about requests and memory: who waits and why, what memory does, how much is done."""

from magicdec.cluster import metric_table as m
from magicdec.cluster.panel import Panel, Query, Row, latency_panel, line_panel
from magicdec.cluster.promql import Selection

_Q = Selection()
_REFUSED = {"decision": "refused|abandoned"}


WAITING = Row(
    "Who waits, and why?",
    (
        line_panel(
            "Waiting in the router, by context",
            "Requests by the least context length of their class.",
            "short",
            _Q.gauge(m.QUEUED_REQUESTS, "context"),
            "from {{context}}",
            stacked=True,
        ),
        latency_panel(
            _Q, "Until a replica takes a request", "Time in the router's queue.", m.QUEUE_TIME
        ),
        latency_panel(_Q, "Until the first token", "Queue and prefill.", m.FIRST_TOKEN),
        latency_panel(
            _Q, "Between outputs", "Of one stream; an output is a round's tokens.", m.TOKEN_GAP
        ),
        latency_panel(_Q, "Whole answers", "From arrival to the last token.", m.END_TO_END),
        line_panel(
            "Prompts beside answers",
            "The share of the time by which prompts' rows made rounds longer.",
            "percentunit",
            _Q.share(m.STALL_SECONDS, m.STEP_SECONDS),
            "stalled",
        ),
        line_panel(
            "Prefill still to do",
            "Tokens to compute before first tokens, in replicas.",
            "short",
            _Q.gauge(m.PREFILL_BACKLOG),
            "tokens",
        ),
        Panel(
            "Sequences in replicas",
            "In the batch, and waiting for room in it.",
            "short",
            (
                Query(_Q.gauge(m.REQUESTS_RUNNING), "running"),
                Query(_Q.gauge(m.REQUESTS_WAITING), "waiting"),
            ),
        ),
        Panel(
            "Turned away",
            "Refused with 429, or given up by their clients; and errors of all kinds.",
            "ops",
            (
                Query(_Q.rate(m.DECISIONS, matchers=_REFUSED, zero=True), "by the router"),
                Query(_Q.rate(m.ERRORS, zero=True), "errors"),
            ),
        ),
        line_panel(
            "Streams that went on elsewhere",
            "Their replica died or was taken away.",
            "ops",
            _Q.rate(m.RESUMES, zero=True),
            "resumed",
        ),
    ),
)


MEMORY = Row(
    "What is memory doing?",
    (
        line_panel(
            "KV pool in use",
            "The share that sequences hold, on the mean and of the fullest replica.",
            "percentunit",
            _Q.mean(m.KV_USAGE),
            "mean",
        ),
        line_panel(
            "KV blocks by state",
            "Cached ones are given up when there is need of them.",
            "short",
            _Q.gauge(m.KV_BLOCKS, "state"),
            "{{state}}",
            stacked=True,
        ),
        Panel(
            "KV tokens in flight",
            "What sequences hold and what waits in replicas, beside what the pools hold: what "
            "autoscaling goes by.",
            "short",
            (
                Query(_Q.gauge(m.TOKENS_IN_FLIGHT, "state"), "{{state}}"),
                Query(_Q.gauge(m.QUEUED_TOKENS), "queued in the router"),
                Query(_Q.gauge(m.KV_CAPACITY), "capacity"),
            ),
        ),
        line_panel(
            "Prompt tokens found in the prefix cache",
            "Of those that were admitted.",
            "percentunit",
            f"{_Q.rate(m.PREFIX_HITS, zero=True)} / {_Q.rate(m.PREFIX_QUERIES)}",
            "hits",
        ),
        line_panel(
            "Preemptions",
            "Sequences that lost their blocks and begin again: the pool is too small.",
            "ops",
            _Q.rate(m.PREEMPTIONS, zero=True),
            "preempted",
        ),
    ),
)

LOAD = Row(
    "How much is done, and by whom?",
    (
        Panel(
            "Tokens",
            "Prompt tokens admitted, and output tokens.",
            "ops",
            (
                Query(_Q.rate(m.PROMPT_TOKENS), "prompt"),
                Query(_Q.rate(m.GENERATION_TOKENS), "output"),
            ),
        ),
        line_panel(
            "Answers",
            "By how they ended.",
            "ops",
            _Q.rate(m.SUCCESSES, "finished_reason"),
            "{{finished_reason}}",
        ),
        Panel(
            "Lengths",
            "The median prompt and answer.",
            "short",
            (
                Query(_Q.quantile(m.PROMPT_LENGTH, 0.5), "prompt"),
                Query(_Q.quantile(m.ANSWER_LENGTH, 0.5), "answer"),
            ),
        ),
        Panel(
            "Replicas",
            "Those that report, and those kept free for a request that has room nowhere.",
            "short",
            (
                Query(_Q.gauge(m.LIVE_REPLICAS), "live"),
                Query(_Q.gauge(m.RESERVED_REPLICAS), "reserved"),
            ),
        ),
        line_panel(
            "Queue drains",
            "Tokens a second that leave the queue and the replicas; Retry-After goes by it.",
            "ops",
            _Q.gauge(m.DRAIN_RATE),
            "tokens",
        ),
        line_panel(
            "What serves",
            "Attention kernels and ranks a replica.",
            "short",
            _Q.gauge(m.ENGINE_INFO, "attention", "num_ranks"),
            "{{attention}}, {{num_ranks}} rank(s)",
        ),
        line_panel(
            "What watching costs",
            "Counting and publishing, as a share of the steps' time.",
            "percentunit",
            _Q.share(m.TELEMETRY_SECONDS, m.STEP_SECONDS),
            "telemetry",
        ),
    ),
)
