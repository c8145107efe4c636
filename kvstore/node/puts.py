"""Puts: memory for objects to come. `tickets.py` has the life of one."""

from __future__ import annotations

from collections.abc import Iterator

from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, Refusal, TierName
from tandem.kvstore.node.books import Books
from tandem.kvstore.node.host import HostObject, Phase
from tandem.kvstore.node.settings import PUT_LEASE_S, ZOMBIE_GRACE_S
from tandem.kvstore.node.tickets import Ticket, TicketState
from tandem.kvstore.node.write_backs import WriteBacks


class Puts:
    """`tickets.TicketOffice`. Owns the tickets that are open or zombies, under the books' lock."""

    def __init__(self, books: Books, write_backs: WriteBacks) -> None:
        self._books = books
        self._write_backs = write_backs
        self._tickets: set[Ticket] = set()

    def begin(self, key: ObjectKey, info: ObjectInfo) -> Ticket | Refusal:
        """A ticket for `info.size` bytes. An object that is on disk only is taken, too: that saves its next fetch.
        Raises ValueError for a size that is not positive."""
        if info.size <= 0:
            raise ValueError(f"ObjectInfo.size is {info.size}: an object has bytes")
        books = self._books
        with books.lock:
            item: HostObject | Refusal | None = self._why_not(key)
            if item is None:
                item = books.host.reserve(key, info, Phase.WRITING)
            if isinstance(item, Refusal):
                books.counters.refuse(item)
                outcome: Ticket | Refusal = item
            else:
                outcome = Ticket(self, item, books.host.view(item), books.clock() + PUT_LEASE_S)
                self._tickets.add(outcome)
        books.announcer.publish()
        return outcome

    def rename_put(self, ticket: Ticket, key: ObjectKey, info: ObjectInfo) -> Refusal | None:
        """Makes it the put of another object, for `Ticket.commit_as`. None: it is from now on."""
        books = self._books
        with books.lock:
            refusal = self._why_not(key) if ticket.state is TicketState.OPEN else Refusal.CLOSED
            if refusal is None:
                books.host.rename(ticket.item, key, info)
            elif ticket.state is TicketState.OPEN:
                books.counters.refuse(refusal)
        books.announcer.publish()
        return refusal

    def commit_put(self, ticket: Ticket) -> bool:
        """Makes the object findable, for `Ticket.commit`."""
        books = self._books
        with books.lock:
            item, was_open = ticket.item, ticket.state is TicketState.OPEN
            if ticket.state is TicketState.DONE:
                return False
            self._finish(ticket)
            if was_open and not books.closed:
                item.dirty = True
                if books.host.complete(item, item.info):
                    books.announcer.note(item.key, TierName.HOST, item.info.size)
                    self._write_backs.offer(item)
            elif was_open:
                books.host.detach(item)
            stored = item.phase is Phase.COMPLETE
            books.host.release(item)
        books.announcer.publish()
        return stored

    def abort_put(self, ticket: Ticket) -> None:
        """Gives key and memory back, for `Ticket.abort`."""
        with self._books.lock:
            if ticket.state is TicketState.DONE:
                return
            self._finish(ticket)
            self._books.host.detach(ticket.item)
            self._books.host.release(ticket.item)

    # Under the lock

    def reap(self, now: float) -> None:
        """Ends the tickets whose time is up: open ones become zombies, of zombies the memory is used again."""
        for ticket in [ticket for ticket in self._tickets if ticket.deadline <= now]:
            if ticket.state is TicketState.OPEN:
                self._books.host.detach(ticket.item)
                ticket.state = TicketState.ZOMBIE
                ticket.deadline = now + ZOMBIE_GRACE_S
                self._books.counters.reaped += 1
            else:
                self._finish(ticket)
                self._books.host.release(ticket.item)

    def held(self) -> Iterator[HostObject]:
        """What tickets have leases of."""
        return (ticket.item for ticket in self._tickets)

    @property
    def num_open(self) -> int:
        return len(self._tickets) - self.num_zombies

    @property
    def num_zombies(self) -> int:
        return sum(1 for ticket in self._tickets if ticket.state is TicketState.ZOMBIE)

    def _why_not(self, key: ObjectKey) -> Refusal | None:
        """Why a put cannot begin. Offering what is there counts as a use of it: a worker has it cached, and so does not
        ask for it."""
        books = self._books
        if books.closed:
            return Refusal.CLOSED
        if (found := books.host.get(key)) is not None:
            books.host.shelf.hit(found)
            return Refusal.EXISTS
        return Refusal.EXISTS if books.host.pending(key) is not None else None

    def _finish(self, ticket: Ticket) -> None:
        ticket.state = TicketState.DONE
        self._tickets.discard(ticket)
