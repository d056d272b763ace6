/* Expose, publish, pull, release: dispatch, cached dispatch and combine on GPUs.

   Rank h's heap holds published[p], released[p] and message[p] of every peer p, who writes them. An operation of a rank
   is two programs: its owner publishes and stages, its reader pulls and releases; its stream closes it.

   Epochs grow for ever in the code. Here they are counted from the slowest rank, which is at 1 (forget_epochs); what is
   older is never compared. words_stay_near says how far apart they are, so what modulus would do: 5. */

#define STEPS 8
#define ALL 7
#define WORD(epoch, step) ((epoch) * STEPS + (step))
byte published[R * R], released[R * R], epoch[R];

#define MESSAGE(owner, reader) ((owner) * (R + 3) + (reader))
#define HALF(owner, round) ((owner) * (R + 3) + R + (MUTANT == ONE_HALF -> 0 : (round) % 2))
#define ROWS(owner) ((owner) * (R + 3) + R + 2)	/* the caller's tensor */
#define CONTENT(epoch, rest) ((epoch) * 16 + (rest))
#define STAGED(s) (seen[MESSAGE(s, me)] & 1)
#define SIGNATURE(s) (seen[MESSAGE(s, me)] >> 1 & 1)
#define TOKENS(s) (seen[MESSAGE(s, me)] >> 2 & 3)	/* counted in rounds */
byte tokens[R];
bool staged[R], signature[R], told[R], refused[R];
#define OWNER 1
#define READER 2

/* What is waited for. */
#define LAST_IS_READ(r) (MUTANT == NO_RELEASE_WAIT || released[AT(me, r)] >= WORD(epoch[me] - 1, ALL))
#define HAS_COME(s) (published[AT(me, s)] >= (MUTANT == ANY_EPOCH -> WORD(0, 1) : WORD(epoch[me], 1)))
#define IS_READ(r) (released[AT(me, r)] >= WORD(epoch[me], ALL))
#define TAKES_PART(r) (op[me] != COMBINE || MUTANT == ALL_TAKE_PART || k - 2 < TOKENS(r))
#define IS_FREE(r) (k < 2 || !TAKES_PART(r) || MUTANT == NO_HALF_WAIT || released[AT(me, r)] >= WORD(epoch[me], k - 1))
#define IN_ROUND(s) (STAGED(s) && (op[me] == COMBINE || k < TOKENS(s)))
#define ROUND_STEP (MUTANT == ANY_ROUND -> k + 1 : k + 2)
#define ROUND_HAS_COME(s) (!IN_ROUND(s) || published[AT(me, s)] >= WORD(epoch[me], ROUND_STEP))
#define AGREES(s) (SIGNATURE(s) == signature[me])
#define WILL_NOT_COME(s) (gone[s] && !HAS_COME(s) && MUTANT != NO_DEADLINE)

/* What must hold. */
#define MESSAGE_IS_THERE(s) (seen[MESSAGE(s, me)] / 16 == epoch[me])
#define ROWS_ARE_THERE(s) (STAGED(s) || seen[ROWS(s)] == CONTENT(epoch[me], 1))
#define ROUND_IS_THERE(s) (!IN_ROUND(s) || seen[HALF(s, k)] == CONTENT(epoch[me], k))
#define IS_NEAR(p) (epoch[p] <= epoch[me] + 1 && epoch[me] <= epoch[p] + 1 && \
	published[AT(me, p)] >= WORD(epoch[me] - 1, 1) && released[AT(me, p)] + 2 * STEPS >= WORD(epoch[me], ALL))

/* A message for one reader. Hazards: the last one may still be read; the flag may be seen before what it speaks of. */
inline write_message(r)
{
	seen[MESSAGE(me, r)] = CONTENT(epoch[me], staged[me] + 2 * signature[me] + 4 * tokens[me])
}

inline write_tensor()	/* by earlier kernels of this stream */
{
	seen[ROWS(me)] = CONTENT(epoch[me], 1)
}

inline tell(r, others)
{
	atomic {
		LAST_IS_READ(r) ->
#if MUTANT != FLAG_BEFORE_MESSAGE
		write_message(r);
#endif
		published[AT(r, me)] = WORD(epoch[me], 1);
		untold = untold & others
	};
#if MUTANT == FLAG_BEFORE_MESSAGE
	write_message(r);
#elif MUTANT == FLAG_BEFORE_TENSOR
	write_tensor()
#endif
}

inline publish_round(r)
{
	published[AT(r, me)] = WORD(epoch[me], k + 2)
}

proctype owner(byte me)
{
	byte untold, k, rounds;	/* untold: peers in question, as bits: LEFT, RIGHT */
idle:
end:	atomic { running[me] & OWNER -> untold = (1 << (R - 1)) - 1 };
	do	/* programs of their own in notify; one after the other in a cached dispatch or combine */
	:: untold & 1 -> tell(LEFT, 2)
#if R > 2
	:: (untold & 2) && (untold == 2 || op[me] == DISPATCH) -> tell(RIGHT, 1)
#endif
	:: untold == 0 -> break
	od;
	atomic {
		EVERY_PEER(HAS_COME) || SOME_PEER(WILL_NOT_COME) ->
		told[me] = true;
		if
		:: EVERY_PEER(HAS_COME)
		:: else -> failed[me] = true; goto staged_all
		fi;
message_before_stage:
		assert(EVERY_PEER(MESSAGE_IS_THERE));
		seen[HALF(me, 0)] = 0; seen[HALF(me, 1)] = 0;	/* released by all: to be read again only when filled */
		rounds = tokens[me];
		if
		:: op[me] == COMBINE -> rounds = TOKENS(LEFT)
		:: else
		fi;
#if R > 2
		if
		:: op[me] == COMBINE && TOKENS(RIGHT) > rounds -> rounds = TOKENS(RIGHT)
		:: else
		fi;
#endif
		if
		:: !staged[me] || rounds == 0 || !EVERY_PEER(AGREES) -> goto staged_all
		:: else
		fi
	};
	do	/* rounds; hazards: a half may still be read; the flag may be seen before the rows */
	:: atomic {
		EVERY_PEER(IS_FREE) ->
#if MUTANT != FLAG_BEFORE_ROUND
		seen[HALF(me, k)] = CONTENT(epoch[me], k);
#endif
		EACH_PEER(publish_round);
#if MUTANT == FLAG_BEFORE_ROUND
	   };
	   atomic {
		seen[HALF(me, k)] = CONTENT(epoch[me], k);
#endif
		k++;
		if
		:: k == rounds -> break
		:: else
		fi
	   }
	od;
staged_all:
	atomic { k = 0; rounds = 0; running[me] = running[me] - OWNER; goto idle }
}

inline release_round(s)
{
	released[AT(s, me)] = WORD(epoch[me], k + 1)
}

inline release(s)
{
	released[AT(s, me)] = WORD(epoch[me], ALL)
}

inline forget_message(s)	/* not to be read any more */
{
	seen[MESSAGE(s, me)] = 0
}

/* Rows are read at some time between seeing the flag and releasing. They are compared at both ends: there from the
   first moment on, and until the last. */
proctype reader(byte me)
{
	byte k, rounds;
idle:
end:	atomic {
		(running[me] & READER) && (told[me] || op[me] != DISPATCH) && (EVERY_PEER(HAS_COME) || SOME_PEER(WILL_NOT_COME)) ->
		if
		:: EVERY_PEER(HAS_COME)
		:: else -> failed[me] = true; goto read_all
		fi;
message_before_flag:
		assert(EVERY_PEER(MESSAGE_IS_THERE));
		if
		:: EVERY_PEER(AGREES) || MUTANT == NO_COMPARING
		:: else -> refused[me] = true; goto read_all
		fi;
agreed_before_reading:
		assert(EVERY_PEER(AGREES));
rows_before_flag:
		assert(EVERY_PEER(ROWS_ARE_THERE));
#if MUTANT == RELEASE_BEFORE_READING
		release(LEFT);
#endif
		if
		:: STAGED(LEFT) -> rounds = (op[me] == COMBINE -> tokens[me] : TOKENS(LEFT))
		:: else
		fi;
#if R > 2
		if
		:: STAGED(RIGHT) && op[me] == COMBINE -> rounds = tokens[me]
		:: STAGED(RIGHT) && op[me] != COMBINE && TOKENS(RIGHT) > rounds -> rounds = TOKENS(RIGHT)
		:: else
		fi;
#endif
		if
		:: rounds == 0 -> goto read_all
		:: else
		fi
	};
	do
	:: atomic {
		ROUND_HAS_COME(LEFT) ->
round_before_flag:
		assert(ROUND_IS_THERE(LEFT))
	   };
#if R > 2
	   atomic { ROUND_HAS_COME(RIGHT) -> assert(ROUND_IS_THERE(RIGHT)) };
#endif
#if MUTANT == ROUND_RELEASED_EARLY
	   release_round(LEFT);
#endif
	   atomic {
		EACH_PEER(release_round);
round_until_release:
		assert(EVERY_PEER(ROUND_IS_THERE));
		k++;
		if
		:: k == rounds -> break
		:: else
		fi
	   }
	od;
read_all:
	atomic { k = 0; rounds = 0; running[me] = running[me] - READER; goto idle }
}

inline start_pull()
{
	if
	:: STAGES & 1 -> staged[me] = false
	:: STAGES & 2 -> staged[me] = true
	fi;
	if
	:: tokens[me] = FEWEST
	:: MOST != FEWEST -> tokens[me] = MOST
	fi;
	if
	:: signature[me] = 0
	:: DISAGREE -> signature[me] = 1
	fi;
#if MUTANT != FLAG_BEFORE_TENSOR
	write_tensor();
#endif
	running[me] = OWNER + READER
}

/* The end of an operation, by its last program. Hazards: a release before the last read; the caller overwrites a direct
   tensor that is still read. */
inline close_pull()
{
	atomic {
		running[me] == 0 ->
		EACH_PEER(release);
rows_until_release:
		assert(failed[me] || (EVERY_PEER(MESSAGE_IS_THERE) && EVERY_PEER(ROWS_ARE_THERE)));
		EACH_PEER(forget_message)
	};
	atomic {
		(staged[me] && !refused[me]) || EVERY_PEER(IS_READ) || failed[me] || MUTANT == OWNER_LEAVES ->
		seen[ROWS(me)] = 0;	/* the caller's again */
		staged[me] = false; tokens[me] = 0; signature[me] = 0; told[me] = false; refused[me] = false;
		if
		:: failed[me] -> goto destroyed
		:: MUTANT == REUSED_EPOCH && op[me] == CACHED
		:: else -> epoch[me]++
		fi;
words_stay_near:
		assert(EVERY_PEER(IS_NEAR));
		forget_epochs();
		op[me] = 0;
		goto next_call
	}
}

inline forget_epochs()
{
	d_step {
		if
		:: epoch[0] > 1 && epoch[1] > 1 && epoch[R - 1] > 1 ->
			for (i : 0 .. R - 1) { epoch[i]-- }
			for (i : 0 .. R * R - 1) {
				published[i] = (published[i] > STEPS -> published[i] - STEPS : 0);
				released[i] = (released[i] > STEPS -> released[i] - STEPS : 0)
			}
			for (i : 0 .. PULL_CELLS - 1) {
				seen[i] = (seen[i] >= 16 -> seen[i] - 16 : 0)
			}
			i = 0
		:: else
		fi
	}
}
