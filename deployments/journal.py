"""What the client already has of a request: enough for another replica to go on with it.

Prompt, seed, parameters and emitted token ids are all the state there is: under shared noise the
tokens are a function of them, so a resumed stream equals the undisturbed one. Under optimal
coupling what is emitted stands too, and the rest is another draw of the same distribution.
"""

from dataclasses import dataclass, field, replace

from magicdec.deployments.errors import replica_died_twice, replica_unavailable
from magicdec.deployments.responses import add_usages
from magicdec.types import Request, RequestOutput, Usage

MAX_DEATHS = 2  # live at this many replica deaths, a request is not sent again
MAX_RESUMES = 2

_NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


class ReplicaLost(Exception):
    """The replica went away under a stream. `died`: it did so with the request live in it."""

    def __init__(self, replica_id: str | None, *, died: bool) -> None:
        super().__init__(f"lost replica {replica_id} (died: {died})")
        self.replica_id = replica_id
        self.died = died


@dataclass(slots=True)
class Journal:
    """One request and what the client already has of it.

    `earlier` holds the rounds and drafts of replicas that are gone; token counts are not in it,
    since the emitted tokens count as output on the next replica. `lost` names the replicas that
    are not to be asked again.
    """

    request: Request
    emitted: list[int] = field(default_factory=list)
    last: Usage = _NOTHING
    earlier: Usage = _NOTHING
    deaths: int = 0
    resumes: int = 0
    attempts: int = 0
    lost: tuple[str, ...] = ()

    def add(self, output: RequestOutput) -> RequestOutput:
        """Writes the output down; gives it the client's id and the usage of the whole request."""
        self.emitted.extend(output.token_ids)
        self.last = output.usage
        usage = add_usages([output.usage, self.earlier])
        return output._replace(request_id=self.request.request_id, usage=usage)

    def next_request(self) -> Request:
        """What the next replica is sent.

        Under an id of its own: an attempt that was given up may still be live where this one lands.
        """
        self.attempts += 1
        request_id = f"{self.request.request_id}#{self.attempts}"
        emitted = tuple(self.emitted)
        return replace(self.request, request_id=request_id, emitted_token_ids=emitted)

    def avoid(self, replica_id: str | None) -> None:
        """Leaves a replica out of this request's next choices, without blame."""
        if replica_id is not None:
            self.lost += (replica_id,)

    def replica_lost(self, loss: ReplicaLost) -> None:
        """Raises ApiError when the request has to end here."""
        self.avoid(loss.replica_id)
        self.deaths += loss.died
        self.resumes += 1
        rounds = self.last._replace(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
        self.earlier = add_usages([rounds, self.earlier])
        self.last = _NOTHING
        if self.deaths >= MAX_DEATHS:
            raise replica_died_twice()
        if self.resumes > MAX_RESUMES:
            raise replica_unavailable()
