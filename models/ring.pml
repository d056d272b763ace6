/* Expose, publish, pull, release on CPU ranks: the message ring of memory/heap.py, and the operations of
   dataplane/cpu on it. A rank is one process: it sends, receives and waits in one loop.

   A low-latency operation is one message, received later, in the order of the sends. A dispatch (cached or not) or a
   combine is a first message, by which the ranks agree, and rounds.

   Numbers of messages grow for ever in the code. Here those of an owner are counted from its oldest in flight
   (release), and epochs from about the slowest rank's (forget_epochs). */

#ifndef R
#define R 2
#endif
#ifndef KINDS	/* of operations: see rank.pml */
#define KINDS 13
#endif
#ifndef LENGTH	/* operations; 0 = without end */
#define LENGTH 0
#endif
#ifndef STAGE	/* units of a rank's stage, at most 3 */
#define STAGE 2
#endif
#ifndef SMALLEST	/* units of a message: SMALLEST or LARGEST, at most 2 */
#define SMALLEST 1
#endif
#ifndef LARGEST
#define LARGEST 1
#endif
#ifndef ROUNDS	/* of one operation, at most 3 */
#define ROUNDS 3
#endif
#ifndef DISAGREE	/* whether ranks can call different things */
#define DISAGREE 0
#endif
#ifndef QUITS	/* whether a rank can stop before any operation, while others go on */
#define QUITS 0
#endif
#define SLOTS 2

/* What can be wrong, one at a time. */
#define NONE 0
#define NO_SLOT_WAIT 1	/* a header is written over one that is not released */
#define NO_STAGE_WAIT 2	/* so is a payload */
#define FLAG_BEFORE_HEADER 3	/* no fence between them */
#define FLAG_BEFORE_PAYLOAD 4
#define ANY_FLAG 5	/* a flag of an earlier message in the slot will do */
#define RELEASE_BEFORE_READING 6
#define KEPT_AFTER_STEP_BACK 7	/* messages of an operation that all step back from are not released */
#define PENDING_LATER 8	/* a dispatch or combine begins before all low-latency operations are received */
#define NO_ADVANCE 9	/* who waits for room does not receive meanwhile */
#define ROUNDS_BY_READER 10	/* a combine stages all rows of one reader, then all of the next */
#define ONE_LOOK 11	/* a peer that is gone is lost, whatever it has published before */
#define NO_LOOK 12	/* who waits does not look after the peers */
#ifndef MUTANT
#define MUTANT NONE
#endif

#define CELL short
#define HEADER(reader, owner, number) (AT(reader, owner) * SLOTS + (number) % SLOTS)
#define UNIT(owner, unit) (R * R * SLOTS + (owner) * STAGE + (unit) % STAGE)
#define CELLS (R * R * SLOTS + R * STAGE)
#include "rank.pml"

/* Of the heap: flags by [reader, owner, slot], released by [owner, reader]. */
byte flag[R * R * SLOTS], released[R * R];
byte next[R], oldest[R];	/* messages that an owner has published; the oldest in flight */
byte got[R * R];	/* messages that [reader] has read of [owner] */
byte place[R * SLOTS], size[R * SLOTS], want[R];	/* of messages in flight; of the next one */
/* Of the operations. */
byte epoch[R], pending[R];	/* low-latency operations that are sent and not received */
byte tokens[R], done[R], bound[R * R];	/* of a combine: tokens of a reader, those summed, of messages at hand */
byte rounds[R], own_bound[R];	/* rounds sent; what the last one covers */
byte have[R], more[R];	/* peers whose message is at hand; who have more to say */
bool agreed[R], signature[R];
#define NO_BOUND 3

/* Room in the stage, as try_reserve finds it. */
#define SLOT(number) (me * SLOTS + (number) % SLOTS)
#define IN_FLIGHT (next[me] - oldest[me])
#define FIRST place[SLOT(oldest[me])]
#define LAST place[SLOT(next[me] + SLOTS - 1)]
#define LAST_END (LAST + size[SLOT(next[me] + SLOTS - 1)])
#define OFFSET (IN_FLIGHT == 0 -> 0 : (LAST >= FIRST && LAST_END + want[me] > STAGE -> 0 : LAST_END))
#define LIMIT (IN_FLIGHT == 0 || OFFSET > FIRST -> STAGE : FIRST)
#define SLOT_IS_FREE (IN_FLIGHT < SLOTS || MUTANT == NO_SLOT_WAIT)
#define HAS_ROOM (SLOT_IS_FREE && (OFFSET + want[me] <= LIMIT || MUTANT == NO_STAGE_WAIT))

/* A header: number + 1, epoch, signature, bound, whether it is the operation's last, place and size of the payload. */
#define HEAD(number, covers, is_last) ((((((((number) + 1) * 8 + epoch[me]) * 2 + signature[me]) * 4 + (covers)) * 2 + \
	(is_last)) * 4 + place[SLOT(number)]) * 4 + size[SLOT(number)])
#define NUMBER_AT 11
#define EPOCH_AT 8
#define ONE_EPOCH (1 << EPOCH_AT)
#define SEEN(p) seen[HEADER(me, p, got[AT(me, p)])]
#define SIZE_OF(p) (SEEN(p) & 3)
#define PLACE_OF(p) (SEEN(p) >> 2 & 3)
#define IS_LAST(p) (SEEN(p) >> 4 & 1)
#define BOUND_OF(p) (SEEN(p) >> 5 & 3)
#define AGREES(p) ((SEEN(p) >> 7 & 1) == signature[me])
#define EPOCH_OF(p) (SEEN(p) >> EPOCH_AT & 7)
#define NUMBER_OF(p) ((SEEN(p) >> NUMBER_AT) - 1)

/* What is waited for. */
#define FLAG(p) flag[HEADER(me, p, got[AT(me, p)])]
#define HAS_COME(p) (FLAG(p) == got[AT(me, p)] + 1 || (MUTANT == ANY_FLAG && FLAG(p) > 0))
#define CAN_COLLECT (pending[me] > 0 && EVERY_PEER(HAS_COME))
#define CAN_SEND (own_bound[me] < NO_BOUND && (agreed[me] || rounds[me] == 0) && HAS_ROOM)
#define CAN_TAKE(p) ((more[me] & BIT(p)) && !(have[me] & BIT(p)) && HAS_COME(p))
#define CAN_AGREE (!agreed[me] && rounds[me] > 0 && have[me] == PEERS)
#define IS_SUMMED (op[me] != COMBINE || done[me] == tokens[me])
#define CAN_READ (agreed[me] && have[me] != 0 && (IS_SUMMED || (more[me] & ~have[me]) == 0))
#define IS_OVER (agreed[me] && own_bound[me] == NO_BOUND && more[me] == 0 && have[me] == 0)
#define IS_STUCK (!CAN_SEND && !SOME_PEER(CAN_TAKE) && !CAN_AGREE && !CAN_READ && !IS_OVER)

/* A peer that is gone and stands in the way is lost. Whether it does is seen after it was seen to be gone: what it has
   published before counts. */
#define IS_SILENT(p) (gone[p] && !HAS_COME(p))
#define IS_MISSING(p) ((more[me] & BIT(p)) && !(have[me] & BIT(p)) && IS_SILENT(p))
#define HAS_RELEASED(o, r) (released[AT(o, r)] > oldest[o])
#define IS_IN_THE_WAY(p) (gone[p] && IN_FLIGHT > 0 && !HAS_RELEASED(me, p))
#define LOSES(condition) (MUTANT != NO_LOOK && (MUTANT == ONE_LOOK -> SOME_PEER(IS_GONE) : (condition)))
#define LOSES_PENDING LOSES(SOME_PEER(IS_SILENT))
#define LOSES_TOGETHER LOSES(IS_STUCK && (SOME_PEER(IS_MISSING) || SOME_PEER(IS_IN_THE_WAY)))
#define LOSES_ROOM LOSES(!HAS_ROOM && !CAN_COLLECT && (pending[me] > 0 -> SOME_PEER(IS_SILENT) : SOME_PEER(IS_IN_THE_WAY)))

/* What must hold. */
#define AWAITED (epoch[me] - IS_LOW(op[me]) - (pending[me] > 0 -> pending[me] - 1 : 0))
#define HEADER_IS_THERE(p) (NUMBER_OF(p) == got[AT(me, p)] && EPOCH_OF(p) == AWAITED)
#define UNIT_IS_THERE(p, unit) (unit >= SIZE_OF(p) || seen[UNIT(p, PLACE_OF(p) + unit)] == got[AT(me, p)] + 1)
#define PAYLOAD_IS_THERE(p) (UNIT_IS_THERE(p, 0) && UNIT_IS_THERE(p, 1))

inline choose_size()
{
	if
	:: want[me] = SMALLEST
	:: LARGEST != SMALLEST -> want[me] = LARGEST
	fi
}

/* Hazards: header or payload over one that is still read; the flag before either. The caller has found room. */
inline write_payload(number)
{
	seen[UNIT(me, place[SLOT(number)])] = number + 1;
	seen[UNIT(me, place[SLOT(number)] + size[SLOT(number)] - 1)] = number + 1
}

inline write_headers(number, to_left, to_right, is_last)
{
	seen[HEADER(LEFT, me, number)] = HEAD(number, to_left, is_last);
#if R > 2
	seen[HEADER(RIGHT, me, number)] = HEAD(number, to_right, is_last);
#endif
}

inline raise_flag(r)
{
	flag[HEADER(r, me, next[me])] = next[me] + 1
}

inline publish(to_left, to_right, is_last)
{
	k = OFFSET;
	place[SLOT(next[me])] = k; k = 0;
	size[SLOT(next[me])] = want[me];
#if MUTANT != FLAG_BEFORE_PAYLOAD
	write_payload(next[me]);
#endif
#if MUTANT != FLAG_BEFORE_HEADER
	write_headers(next[me], to_left, to_right, is_last);
#endif
	EACH_PEER(raise_flag);
	next[me]++;
	choose_size()
}

#if MUTANT == FLAG_BEFORE_PAYLOAD
#define WRITE_LATE write_payload(next[me] - 1);
#elif MUTANT == FLAG_BEFORE_HEADER
#define WRITE_LATE write_headers(next[me] - 1, NO_BOUND, NO_BOUND, true);
#else
#define WRITE_LATE
#endif

#define YOUNGER(number) number = (number > SLOTS -> number - SLOTS : 0)
#define YOUNGER_HEADER(header) header = (header >> NUMBER_AT > SLOTS -> header - (SLOTS << NUMBER_AT) : 0)
/* Its owner may use the room of a message as soon as all have released it. */
inline retire(o)
{
	do
	:: oldest[o] < next[o] && HAS_RELEASED(o, NEXT(o, 1)) && HAS_RELEASED(o, NEXT(o, R - 1)) ->
		k = o * SLOTS + oldest[o] % SLOTS;
		seen[UNIT(o, place[k])] = 0;	/* not to be read any more */
		seen[UNIT(o, place[k] + size[k] - 1)] = 0;
		place[k] = 0; size[k] = 0; k = 0;
		oldest[o]++
	:: else -> break
	od
}

inline release(o)
{
	d_step {
		SEEN(o) = 0;
		got[AT(me, o)]++;
		released[AT(o, me)] = got[AT(me, o)];
		retire(o);
		if
		:: oldest[o] >= 2 * SLOTS ->
			oldest[o] = oldest[o] - SLOTS; next[o] = next[o] - SLOTS;
			for (i : 0 .. R - 1) { YOUNGER(released[AT(o, i)]); YOUNGER(got[AT(i, o)]) }
			for (i : 0 .. R * SLOTS - 1) {
				k = HEADER(i / SLOTS, o, i % SLOTS);
				YOUNGER(flag[k]); YOUNGER_HEADER(seen[k])
			}
			for (i : 0 .. STAGE - 1) { YOUNGER(seen[UNIT(o, i)]) }
			k = 0; i = 0
		:: else
		fi
	}
}

inline release_early(o)
{
#if MUTANT == RELEASE_BEFORE_READING
	released[AT(o, me)] = got[AT(me, o)] + 1; retire(o)
#else
	skip
#endif
}

inline take(p)
{
	more[me] = (IS_LAST(p) -> more[me] - BIT(p) : more[me]);
	have[me] = have[me] | BIT(p);
	bound[AT(me, p)] = BOUND_OF(p);
	release_early(p)
}

/* Sum up to the lowest bound at hand; a message that is used up is released. */
#define LOWERS(p) (op[me] == COMBINE && (have[me] & BIT(p)) && bound[AT(me, p)] < done[me])
#define IS_USED(p) ((have[me] & BIT(p)) && (IS_SUMMED || bound[AT(me, p)] <= done[me]))
inline let_go(p)
{
	if
	:: IS_USED(p) -> release(p); have[me] = have[me] - BIT(p); bound[AT(me, p)] = 0
	:: else
	fi
}

inline forget_epochs()
{
	d_step {
		if
		:: epoch[0] > pending[0] + 2 && epoch[1] > pending[1] + 2 && epoch[R - 1] > pending[R - 1] + 2 ->
			for (i : 0 .. R - 1) { epoch[i]-- }
			for (i : 0 .. R * R * SLOTS - 1) {
				seen[i] = ((seen[i] >> EPOCH_AT & 7) > 0 -> seen[i] - ONE_EPOCH : seen[i])
			}
			i = 0
		:: else
		fi
	}
}

proctype rank(byte me)
{
	byte k;
	choose_size();
next_call:
	if
	:: atomic {
		next_operation();
		if
		:: IS_LOW(op[me]) -> epoch[me]++; goto low_latency
		:: else -> goto together
		fi
	   }
	:: atomic { CAN_COLLECT -> goto collect }	/* a hook; those of older operations are done first */
	:: atomic { QUITS -> goto destroyed }
	fi;

collect:	/* receive the oldest low-latency operation */
	atomic {
		CAN_COLLECT ->
low_latency_before_flag:
		assert(EVERY_PEER(HEADER_IS_THERE) && EVERY_PEER(PAYLOAD_IS_THERE));
		release_early(LEFT);
	};
	atomic {
		pending[me]--;
low_latency_until_release:
		assert(EVERY_PEER(PAYLOAD_IS_THERE));
		release(LEFT);
#if R > 2
		release(RIGHT);
#endif
		if
		:: op[me] == 0 -> goto next_call
		:: IS_LOW(op[me]) -> goto low_latency
		:: else
		fi
	};

together:	/* all that was sent is received first */
	if
	:: atomic { CAN_COLLECT -> goto collect }
	:: atomic { pending[me] > 0 && LOSES_PENDING -> goto lost }
	:: atomic { pending[me] == 0 && op[me] == DESTROY -> goto destroyed }
	:: atomic {
		(pending[me] == 0 || MUTANT == PENDING_LATER) && op[me] != DESTROY ->
		epoch[me]++;
		forget_epochs();
		more[me] = PEERS;
		if
		:: tokens[me] = 0
		:: op[me] == COMBINE -> tokens[me] = 1
		:: op[me] == COMBINE -> tokens[me] = 3
		fi;
		if
		:: signature[me] = 0
		:: DISAGREE -> signature[me] = 1
		fi
	   }
	fi;
	do
	:: atomic {
		CAN_SEND ->
		rounds[me]++;
#if MUTANT == ROUNDS_BY_READER
		own_bound[me] = (rounds[me] == 1 -> 1 : NO_BOUND);
		publish(NO_BOUND, (rounds[me] == 1 -> 0 : NO_BOUND), own_bound[me] == NO_BOUND)
#else
		if
		:: own_bound[me] = NO_BOUND
		:: rounds[me] < ROUNDS && own_bound[me] < 1 -> own_bound[me] = 1
		:: rounds[me] < ROUNDS && own_bound[me] < 2 -> own_bound[me] = 2
		fi;
		publish(own_bound[me], own_bound[me], own_bound[me] == NO_BOUND)
#endif
	   };
	   WRITE_LATE
	:: atomic {
		CAN_TAKE(LEFT) ->
message_before_flag:
		assert(HEADER_IS_THERE(LEFT) && PAYLOAD_IS_THERE(LEFT));
		take(LEFT)
	   }
#if R > 2
	:: atomic {
		CAN_TAKE(RIGHT) ->
		assert(HEADER_IS_THERE(RIGHT) && PAYLOAD_IS_THERE(RIGHT));
		take(RIGHT)
	   }
#endif
	:: atomic {
		CAN_AGREE ->
		if
		:: EVERY_PEER(AGREES) -> agreed[me] = true
		:: else ->
#if MUTANT != KEPT_AFTER_STEP_BACK
			release(LEFT);
#if R > 2
			release(RIGHT);
#endif
#endif
			break
		fi
	   }
	:: atomic {
		CAN_READ ->
message_until_release:
		assert(!(have[me] & BIT(LEFT)) || PAYLOAD_IS_THERE(LEFT));
#if R > 2
		assert(!(have[me] & BIT(RIGHT)) || PAYLOAD_IS_THERE(RIGHT));
#endif
		done[me] = tokens[me];
		done[me] = (LOWERS(LEFT) -> bound[AT(me, LEFT)] : done[me]);
#if R > 2
		done[me] = (LOWERS(RIGHT) -> bound[AT(me, RIGHT)] : done[me]);
		let_go(RIGHT);
#endif
		let_go(LEFT);
		if
		:: IS_OVER -> break
		:: else
		fi
	   }
	:: atomic { IS_OVER -> break }
	:: atomic { LOSES_TOGETHER -> goto lost }
	od;
	atomic {
		more[me] = 0; have[me] = 0; agreed[me] = false; rounds[me] = 0; own_bound[me] = 0; done[me] = 0; tokens[me] = 0;
		signature[me] = 0;
		for (i : 0 .. R - 1) { bound[AT(me, i)] = 0 }
		i = 0; op[me] = 0;
		goto next_call
	};

low_latency:	/* waits for room; hazard: all wait, until somebody receives */
	if
	:: atomic {
		HAS_ROOM ->
		publish(NO_BOUND, NO_BOUND, true);
		pending[me]++;
		forget_epochs();
		op[me] = 0
	   };
	   WRITE_LATE
	   goto next_call
	:: atomic { CAN_COLLECT && MUTANT != NO_ADVANCE -> goto collect }
	:: atomic { LOSES_ROOM -> goto lost }
	fi;

lost:	/* a peer that will not answer; not while all go on to the end */
nobody_is_lost:
	assert(QUITS);
destroyed:
	gone[me] = true
}

init {
	atomic {
		for (i : 0 .. R - 1) { run rank(i) }
		i = 0
	}
}
