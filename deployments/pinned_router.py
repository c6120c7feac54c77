"""Serve's request router for EngineReplica: obeys the `target` that our Router chose.

Serve pickles the class into every process that holds a handle, so nothing of ours is imported.
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class PinnedRequestRouter(RequestRouter):
    """The replica named by the call's `target`; without one, or if it is gone, any other.

    Within a rank Serve takes the shortest queue. It matches a routed request by its HTTP
    request's id, so two calls of one HTTP request must not be routed at the same time.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        target = None if pending_request is None else pending_request.kwargs.get("target")
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        pinned = [r for r in candidate_replicas if r.replica_id.unique_id == target]
        others = [r for r in candidate_replicas if r.replica_id.unique_id != target]
        return [rank for rank in (pinned, others) if rank]
