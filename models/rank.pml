/* What the models share: weak memory, and the sequence of operations.

   R ranks. `me` is the rank of a process, LEFT and RIGHT are its peers; with two ranks there is no RIGHT. */

#define NEXT(r, step) (((r) + (step)) % R)
#define LEFT NEXT(me, 1)
#define RIGHT NEXT(me, 2)
#define AT(heap, peer) ((heap) * R + (peer))	/* a word in a rank's heap for each peer */
#if R == 2
#define EVERY_PEER(condition) (condition(LEFT))
#define SOME_PEER(condition) (condition(LEFT))
#else
#define EVERY_PEER(condition) (condition(LEFT) && condition(RIGHT))
#define SOME_PEER(condition) (condition(LEFT) || condition(RIGHT))
#endif
byte i;	/* of loops in one step; 0 between steps */

/* Weak memory. A store of data is late at first; it arrives at any later time, those of a rank in any order. A flag is
   a release store: it is made when all has arrived that it speaks of. A mutant makes it earlier. A cell says of which
   operation or message its content is, so that a reader can tell what it got; 0 = of none that may be read.

   Flags for several ranks are raised in one step: a rank that sees one early and is slow cannot be told from a rank that
   sees it late. For the same reason a flag itself is never late. */
CELL seen[CELLS], late[CELLS];
#define STORE(cell, content) late[cell] = content
#define ARRIVED(cell) (late[cell] == 0)
#define ARRIVE(cell) :: d_step { (cell) < CELLS && late[(cell) % CELLS] != 0 -> \
	seen[(cell) % CELLS] = late[(cell) % CELLS]; late[(cell) % CELLS] = 0 }
#define ARRIVE6(cell) ARRIVE(cell) ARRIVE(cell + 1) ARRIVE(cell + 2) ARRIVE(cell + 3) ARRIVE(cell + 4) ARRIVE(cell + 5)

proctype memory()
{
end:	do
	ARRIVE6(0)
#if CELLS > 6
	ARRIVE6(6)
#endif
#if CELLS > 12
	ARRIVE6(12)
#endif
#if CELLS > 18
	ARRIVE6(18) ARRIVE6(24)
#endif
#if CELLS > 30
	ARRIVE6(30) ARRIVE6(36) ARRIVE6(42) ARRIVE6(48)
#endif
	od
}

/* The operations: the first rank to come to each decides which of KINDS it is, or that all destroy their Buffers then.
   Without end, or LENGTH of them. What all ranks have begun is forgotten. */
#define DISPATCH 1
#define CACHED 2
#define COMBINE 4
#define LOW_DISPATCH 8
#define LOW_COMBINE 16
#define DESTROY 32
#define IS_LOW(kind) ((kind) == LOW_DISPATCH || (kind) == LOW_COMBINE)
#define AHEAD 4
byte sequence[AHEAD], begun[R], op[R], decided;
bool gone[R];	/* has destroyed its Buffer, or failed */
#define IS_GONE(r) (gone[r])
#define CAN_BE(kind) (sequence[begun[me]] == 0 && (KINDS & (kind)) && (LENGTH == 0 || decided < LENGTH))

inline next_operation()
{
	if
	:: sequence[begun[me]] != 0
	:: CAN_BE(DISPATCH) -> sequence[begun[me]] = DISPATCH; decided++
	:: CAN_BE(CACHED) -> sequence[begun[me]] = CACHED; decided++
	:: CAN_BE(COMBINE) -> sequence[begun[me]] = COMBINE; decided++
	:: CAN_BE(LOW_DISPATCH) -> sequence[begun[me]] = LOW_DISPATCH; decided++
	:: CAN_BE(LOW_COMBINE) -> sequence[begun[me]] = LOW_COMBINE; decided++
	:: sequence[begun[me]] == 0 -> sequence[begun[me]] = DESTROY
	fi;
	d_step {
		op[me] = sequence[begun[me]];
		begun[me]++;
		decided = (LENGTH == 0 -> 0 : decided);
		if
		:: begun[0] > 0 && begun[1] > 0 && begun[R - 1] > 0 ->
			for (i : 0 .. R - 1) { begun[i]-- }
			for (i : 0 .. AHEAD - 2) { sequence[i] = sequence[i + 1] }
			sequence[AHEAD - 1] = 0; i = 0
		:: else
		fi;
ranks_stay_near:
		assert(begun[me] < AHEAD)
	}
}
