"""Every metric there is. telemetry.py records them, dashboard.py and alerts.py query them,
docs/metrics.md is their table. Times in seconds."""

from magicdec.cluster.metrics import Kind, Metric, Source

COUNTER, GAUGE, HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
ENGINE, ROUTER, INGRESS = Source.ENGINE, Source.ROUTER, Source.INGRESS

# Of minutes of prefill as of milliseconds; and of contexts up to a million tokens.
LATENCIES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0)
GAPS = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
LENGTHS = tuple(float(2**bits) for bits in range(4, 21))


def _engine(name: str, kind: Kind, text: str, *labels: str) -> Metric:
    return Metric(name, kind, ENGINE, text, labels)


def _router(name: str, kind: Kind, text: str, *labels: str) -> Metric:
    return Metric(name, kind, ROUTER, text, labels)


def _histogram(name: str, boundaries: tuple[float, ...], text: str) -> Metric:
    return Metric(name, HISTOGRAM, INGRESS, text, boundaries=boundaries)


# The engine's requests and tokens.
REQUESTS_RUNNING = _engine("vllm_num_requests_running", GAUGE, "Sequences in the batch.")
REQUESTS_WAITING = _engine(
    "vllm_num_requests_waiting", GAUGE, "Sequences in the replica that are not in the batch yet."
)
PROMPT_TOKENS = _engine(
    "vllm_prompt_tokens", COUNTER, "Prompt tokens of admitted requests, cached ones included."
)
GENERATION_TOKENS = _engine("vllm_generation_tokens", COUNTER, "Output tokens.")
PREEMPTIONS = _engine(
    "vllm_num_preemptions", COUNTER, "Sequences that gave up their KV blocks and began again."
)
PREFIX_QUERIES = _engine(
    "vllm_prefix_cache_queries", COUNTER, "Prompt tokens looked up in the prefix cache."
)
PREFIX_HITS = _engine("vllm_prefix_cache_hits", COUNTER, "Prompt tokens found there.")

# What memory is doing.
KV_USAGE = _engine("vllm_kv_cache_usage_perc", GAUGE, "Share of the KV pool held, 0 to 1.")
KV_BLOCKS = _engine(
    "magicdec_kv_blocks",
    GAUGE,
    "KV blocks by state: held by sequences, cached (a prefix may find them), empty.",
    "state",
)
KV_CAPACITY = _engine("magicdec_kv_capacity_tokens", GAUGE, "KV tokens that the pool holds.")
TOKENS_IN_FLIGHT = _engine(
    "magicdec_kv_tokens_in_flight",
    GAUGE,
    "KV tokens held by sequences, and tokens of those that wait in the replica.",
    "state",
)
PREFILL_BACKLOG = _engine(
    "magicdec_prefill_backlog_tokens", GAUGE, "Tokens still to compute before first tokens."
)

# Who drafts, how far, over how much, and what comes of it.
ROUNDS = _engine(
    "magicdec_rounds",
    COUNTER,
    "Rounds by what was chosen for them; `decision` is best, or trial where it was to learn by. "
    "Plain ones have drafter none.",
    "drafter",
    "draft_length",
    "draft_budget",
    "decision",
)
ROWS = _engine(
    "magicdec_decode_rows",
    COUNTER,
    "Sequences of rounds, by the least context length of their bucket and the tokens drafted.",
    "context",
    "drafted",
)
DRAFTS = _engine("vllm_spec_decode_num_drafts", COUNTER, "Sequences of rounds that had a draft.")
DRAFT_TOKENS = _engine("vllm_spec_decode_num_draft_tokens", COUNTER, "Drafted tokens.")
ACCEPTED_TOKENS = _engine("vllm_spec_decode_num_accepted_tokens", COUNTER, "Of them, accepted.")
ACCEPTED_PER_POS = _engine(
    "vllm_spec_decode_num_accepted_tokens_per_pos",
    COUNTER,
    "Accepted tokens by position in the draft, from 0.",
    "position",
)
EXAMINED = _engine(
    "magicdec_drafts_examined",
    COUNTER,
    "Drafted tokens before which all were accepted, by context bucket and position from 0: "
    "accepted over examined is the hazard that the controller estimates.",
    "context",
    "position",
)
ACCEPTED = _engine("magicdec_drafts_accepted", COUNTER, "Of them, accepted.", "context", "position")
DRAFTER_TOKENS = _engine(
    "magicdec_drafter_tokens", COUNTER, "Drafted tokens by who drafted.", "drafter"
)
DRAFTER_ACCEPTED = _engine(
    "magicdec_drafter_accepted_tokens", COUNTER, "Of them, accepted.", "drafter"
)
KV_READ = _engine(
    "magicdec_kv_positions_read",
    COUNTER,
    "KV positions read for decode rows, by pass: verify reads whole contexts, draft a view.",
    "pass",
)

# Where time goes.
STEP_SECONDS = _engine("magicdec_step_seconds", COUNTER, "Time of engine steps.")
PASS_SECONDS = _engine("magicdec_pass_seconds", COUNTER, "Of it, in draft and verify.", "pass")
STALL_SECONDS = _engine(
    "magicdec_prefill_stall_seconds",
    COUNTER,
    "By how much prompts' rows made steps longer in which answers were written: by the cost "
    "model, where draft_length is set by their share of the rows.",
)
TELEMETRY_SECONDS = _engine(
    "magicdec_telemetry_seconds", COUNTER, "What counting and publishing all this took."
)
FORESEEN_SECONDS = _engine(
    "magicdec_foreseen_step_seconds",
    COUNTER,
    "Time of those steps of which the cost model foresaw a time; none where draft_length is set.",
)
PREDICTED_SECONDS = _engine("magicdec_predicted_step_seconds", COUNTER, "What it foresaw for them.")
FORECAST_ERROR = _engine(
    "magicdec_forecast_error_seconds", COUNTER, "The sum of how far each of them was off."
)
PLAIN_SECONDS = _engine(
    "magicdec_plain_decoding_seconds",
    COUNTER,
    "What plain decoding would have taken for the tokens of these steps, by the cost model: over "
    "magicdec_foreseen_step_seconds it is the estimated speedup.",
)
BOUND_SECONDS = _engine(
    "magicdec_verify_bound_seconds",
    COUNTER,
    "What the cost model says that verify passes went to: weights, kv, compute, overhead.",
    "bound",
)
ENGINE_INFO = _engine(
    "magicdec_engine_info", GAUGE, "1; its labels say what serves.", "attention", "num_ranks"
)

# Who waits.
QUEUED_REQUESTS = _router(
    "magicdec_queued_requests",
    GAUGE,
    "Requests that wait in the router, by the least context length of their class.",
    "context",
)
QUEUED_TOKENS = _router(
    "magicdec_queued_tokens", GAUGE, "Their contexts and the answers expected, in tokens."
)
LIVE_REPLICAS = _router("magicdec_live_replicas", GAUGE, "Replicas that report.")
RESERVED_REPLICAS = _router(
    "magicdec_reserved_replicas", GAUGE, "Replicas kept for a request that has room nowhere yet."
)
DRAIN_RATE = _router(
    "magicdec_drain_tokens_per_second", GAUGE, "How fast the queue drains; absent at first."
)
DECISIONS = _router(
    "magicdec_router_decisions",
    COUNTER,
    "Requests released to a replica, refused (429) and abandoned by their clients; reports and "
    "policies of replicas dropped because they could not be true.",
    "decision",
)

# What clients see.
QUEUE_TIME = _histogram(
    "vllm_request_queue_time_seconds", LATENCIES, "From a request's arrival to a replica taking it."
)
FIRST_TOKEN = _histogram(
    "vllm_time_to_first_token_seconds", LATENCIES, "From a request's arrival to its first token."
)
TOKEN_GAP = _histogram(
    "vllm_inter_token_latency_seconds", GAPS, "Between one output of a stream and the next."
)
END_TO_END = _histogram(
    "vllm_e2e_request_latency_seconds", LATENCIES, "From a request's arrival to its last token."
)
PROMPT_LENGTH = _histogram("vllm_request_prompt_tokens", LENGTHS, "Prompt tokens of a request.")
ANSWER_LENGTH = _histogram("vllm_request_generation_tokens", LENGTHS, "Output tokens of a request.")
SUCCESSES = Metric(
    "vllm_request_success", COUNTER, INGRESS, "Answers that ended.", ("finished_reason",)
)
RESUMES = Metric("magicdec_resumes", COUNTER, INGRESS, "Streams that another replica went on with.")
ERRORS = Metric(
    "magicdec_request_errors", COUNTER, INGRESS, "Requests that ended in an error.", ("status",)
)

ENGINE_METRICS = (
    *(REQUESTS_RUNNING, REQUESTS_WAITING, PROMPT_TOKENS, GENERATION_TOKENS, PREEMPTIONS),
    *(PREFIX_QUERIES, PREFIX_HITS, KV_USAGE, KV_BLOCKS, KV_CAPACITY, TOKENS_IN_FLIGHT),
    *(PREFILL_BACKLOG, ROUNDS, ROWS, DRAFTS, DRAFT_TOKENS, ACCEPTED_TOKENS, ACCEPTED_PER_POS),
    *(EXAMINED, ACCEPTED, DRAFTER_TOKENS, DRAFTER_ACCEPTED, KV_READ, STEP_SECONDS, PASS_SECONDS),
    *(STALL_SECONDS, FORESEEN_SECONDS, PREDICTED_SECONDS, FORECAST_ERROR, PLAIN_SECONDS),
    *(BOUND_SECONDS, TELEMETRY_SECONDS, ENGINE_INFO),
)
ROUTER_METRICS = (
    *(QUEUED_REQUESTS, QUEUED_TOKENS, LIVE_REPLICAS, RESERVED_REPLICAS, DRAIN_RATE, DECISIONS),
)
INGRESS_METRICS = (
    *(QUEUE_TIME, FIRST_TOKEN, TOKEN_GAP, END_TO_END, PROMPT_LENGTH, ANSWER_LENGTH),
    *(SUCCESSES, RESUMES, ERRORS),
)
METRICS = (*ENGINE_METRICS, *ROUTER_METRICS, *INGRESS_METRICS)
