/* What the models share: memory, and the sequence of operations.

   R ranks. `me` is the rank of a process, LEFT and RIGHT are its peers; with two ranks there is no RIGHT. */

#define NEXT(r, step) (((r) + (step)) % R)
#define LEFT NEXT(me, 1)
#define RIGHT NEXT(me, 2)
#define BIT(p) (1 << (p))
#define PEERS ((1 << R) - 1 - BIT(me))
#define AT(heap, peer) ((heap) * R + (peer))	/* a word in a rank's heap for each peer */
#if R == 2
#define EVERY_PEER(condition) (condition(LEFT))
#define SOME_PEER(condition) (condition(LEFT))
#define EACH_PEER(act) act(LEFT)
#else
#define EVERY_PEER(condition) (condition(LEFT) && condition(RIGHT))
#define SOME_PEER(condition) (condition(LEFT) || condition(RIGHT))
#define EACH_PEER(act) act(LEFT); act(RIGHT)
#endif
byte i;	/* of loops in one step; 0 between steps */

/* Memory. A cell says of which operation or message its content is, so that a reader can tell what it got; 0 = none to
   be read. Data is compared at both ends of a read. So it is no loss that data and the flag that speaks of it are one
   step: who would see one early and the other late reads something wrong at one end, or notices nothing. That the flag
   is the later one is what a release store means; a mutant has them in the other order, as two steps.

   Flags for several ranks are raised in one step, too: a rank that sees one early and is slow cannot be told from a rank
   that sees it late. */
CELL seen[CELLS];

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
