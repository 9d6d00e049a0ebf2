// Requests in, tokens out: continuous batching around `Model`, as a C interface.
//
// Every pass takes the newest token of each sequence that writes, with guesses of what follows, and fills the batch up
// with prompts in the order of their arrival. No Python runs between tokens; whoever wants them reads them from the request's list.
#include "guesses.hpp"

#include <deque>
#include <optional>
#include <string>
#include <unordered_map>

namespace hasten {

class Server {
public:
    std::atomic<int64_t> guessed{0}, right{0};

    Server(const Shape& shape, const Shape* draft) : s(shape), team(shape.threads), model(shape, team), free_(shape.slots) {
        if (draft) draft_.emplace(*draft, team);
        std::iota(free_.rbegin(), free_.rend(), 0);
        worker_ = std::thread([this] { serve(); });
    }
    ~Server() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            closing_ = true;
        }
        wake_.notify_all();
        worker_.join();
    }

    int64_t submit(std::shared_ptr<Sequence> sequence) {
        std::lock_guard<std::mutex> lock(mutex_);
        int64_t handle = next_++;
        all_[handle] = sequence, waiting_.push_back(sequence);
        wake_.notify_all();
        return handle;
    }

    // Copies tokens from number `seen` on; how many, and the status at that moment. A forgotten request is cancelled.
    int poll(int64_t handle, int seen, int room, int32_t* ids, double* seconds, int32_t* status) {
        std::lock_guard<std::mutex> lock(mutex_);
        *status = CANCELLED;
        if (!all_.count(handle)) return 0;
        Sequence& q = *all_[handle];
        int count = std::min(room, int(q.ids.size()) - seen);
        std::copy_n(q.ids.begin() + seen, count, ids), std::copy_n(q.seconds.begin() + seen, count, seconds);
        *status = seen + count == int(q.ids.size()) ? q.status : int32_t(RUNNING);
        return count;
    }

    // Waits until the request has ended, at most so long.
    void wait(int64_t handle, double seconds) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!all_.count(handle)) return;
        auto sequence = all_[handle];
        ended_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return sequence->status >= FINISHED; });
    }

    void cancel(int64_t handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        if (all_.count(handle)) all_[handle]->cancelled = true;
        wake_.notify_all();
    }

    void forget(int64_t handle) {
        cancel(handle);
        std::lock_guard<std::mutex> lock(mutex_);
        all_.erase(handle);
    }

    size_t cache_bytes() const { return model.cache_bytes() + (draft_ ? draft_->cache_bytes() : 0); }

private:
    using Asking = std::vector<std::pair<std::shared_ptr<Sequence>, int>>;

    void serve() {
        stay_on_core(0, s.threads);  // it is the first of the team
        std::vector<Input> inputs;
        Asking asking;
        for (;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                admit();
                while (running_.empty() && !closing_) wake_.wait(lock), admit();
                if (closing_) {
                    for (auto& q : running_) end(*q, CANCELLED);
                    for (auto& q : waiting_) end(*q, CANCELLED);
                    ended_.notify_all();
                    return;
                }
            }
            // No lock: what follows changes nothing that a caller reads until its tokens are taken.
            guess();
            plan(inputs, asking);
            model.forward(inputs);
            std::vector<std::vector<int>> chosen;
            for (auto& [q, row] : asking) chosen.push_back(choose(*q, row));
            std::lock_guard<std::mutex> lock(mutex_);
            for (size_t i = 0; i < asking.size(); i++)
                for (int id : chosen[i]) take(*asking[i].first, id);
            auto over = [&](auto& q) { return q->status >= FINISHED; };
            running_.erase(std::remove_if(running_.begin(), running_.end(), over), running_.end());
        }
    }

    // Cancelled requests go, waiting ones get the free slots.
    void admit() {
        auto dropped = [&](auto& q) {
            if (q->cancelled) end(*q, CANCELLED);
            return q->cancelled;
        };
        running_.erase(std::remove_if(running_.begin(), running_.end(), dropped), running_.end());
        waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), dropped), waiting_.end());
        while (!waiting_.empty() && !free_.empty()) {
            auto q = waiting_.front();
            waiting_.pop_front();
            q->slot = free_.back(), q->status = RUNNING;
            free_.pop_back(), running_.push_back(q);
        }
    }

    // What may come next of every sequence that writes, as far as the pass has room.
    void guess() {
        int room = s.batch - int(running_.size());
        for (auto& q : running_) {
            if (q->ids.empty()) continue;
            q->wanted = std::min({s.guesses, room, q->most - int(q->ids.size()) - 1});
            if (!draft_ && q->wanted) look_up(*q);
            room -= draft_ ? q->wanted : int(q->guesses.size());
        }
        if (draft_) draft_->guess(running_);
    }

    // Inputs of the next pass, and who asks for what comes next, with the first of its rows of logits. A guess is computed
    // in the same pass as what it depends on; if it was wrong, its place in the cache is written again.
    void plan(std::vector<Input>& inputs, Asking& asking) {
        inputs.clear(), asking.clear();
        int rows = 0;
        for (auto& q : running_) {
            if (q->ids.empty()) continue;
            asking.push_back({q, rows});
            for (int place = q->fed; place < q->length() + int(q->guesses.size()); place++)
                inputs.push_back({q->at(place), q->slot, place, rows++});
        }
        for (auto& q : running_) {
            if (!q->ids.empty()) continue;
            for (int length = int(q->prompt.size()); q->fed < length && int(inputs.size()) < s.batch; q->fed++) {
                bool last = q->fed == length - 1;
                if (last) asking.push_back({q, rows});
                inputs.push_back({q->prompt[q->fed], q->slot, q->fed, last ? rows++ : -1});
            }
        }
    }

    // What comes next: one token more than guesses were right; -1 where what decides it is not a number.
    std::vector<int> choose(Sequence& q, int row) {
        std::vector<int> chosen;
        for (size_t i = 0; i <= q.guesses.size(); i++) {
            chosen.push_back(q.next(model.row_of_logits(row + int(i)), s.vocabulary, int(i)));
            if (i == q.guesses.size() || chosen.back() != q.guesses[i]) break;
        }
        int agreed = int(chosen.size()) - 1;
        guessed += int64_t(q.guesses.size()), right += agreed;
        q.drafted = std::min(q.drafted, q.length() + agreed);  // the draft has read wrong guesses beyond
        q.guesses.clear();
        return chosen;
    }

    void take(Sequence& q, int id) {
        if (q.status >= FINISHED) return;  // it stopped within what was guessed
        if (id < 0) return end(q, NOT_FINITE);
        q.ids.push_back(id);
        q.fed = q.length() - 1;
        q.seconds.push_back(std::chrono::duration<double>(Clock::now() - q.sent).count());
        bool stops = std::find(q.stops.begin(), q.stops.end(), id) != q.stops.end();
        if (stops || int(q.ids.size()) == q.most) end(q, FINISHED);
    }

    void end(Sequence& q, Status status) {
        if (q.slot >= 0) free_.push_back(q.slot), q.slot = -1;
        q.status = status;
        ended_.notify_all();
    }

    Shape s;
    Team team;
    Model model;
    std::optional<Draft> draft_;
    std::vector<int> free_;
    std::deque<std::shared_ptr<Sequence>> waiting_;
    std::vector<std::shared_ptr<Sequence>> running_;
    std::unordered_map<int64_t, std::shared_ptr<Sequence>> all_;
    int64_t next_ = 1;
    bool closing_ = false;
    std::mutex mutex_;
    std::condition_variable wake_, ended_;
    std::thread worker_;
};

}  // namespace hasten

using hasten::Sequence;
using hasten::Server;

extern "C" {

// Which kernels this build has.
const char* hasten_kernels() { return INSTRUCTIONS; }

// draft: of the same slots and batch; or null.
Server* hasten_open(const hasten::Shape* shape, const hasten::Shape* draft) {
    try {
        return new Server(*shape, draft);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void hasten_close(Server* server) { delete server; }
// Tokens that were guessed, and those of them that were right.
void hasten_guesses(const Server* server, int64_t* guessed, int64_t* right) {
    *guessed = server->guessed, *right = server->right;
}
int64_t hasten_cache_bytes(const Server* server) { return int64_t(server->cache_bytes()); }

int64_t hasten_submit(Server* server, const int32_t* prompt, int32_t length, int32_t most, const int32_t* stops,
                      int32_t stop_count, float temperature, float top_p, uint64_t seed) {
    auto q = std::make_shared<Sequence>();
    q->prompt.assign(prompt, prompt + length), q->stops.assign(stops, stops + stop_count);
    q->most = most, q->temperature = temperature, q->top_p = top_p, q->seed = seed;
    q->ids.reserve(most), q->seconds.reserve(most);
    return server->submit(std::move(q));
}

int32_t hasten_poll(Server* server, int64_t handle, int32_t seen, int32_t room, int32_t* ids, double* seconds, int32_t* status) {
    return server->poll(handle, seen, room, ids, seconds, status);
}
void hasten_wait(Server* server, int64_t handle, double seconds) { server->wait(handle, seconds); }
void hasten_cancel(Server* server, int64_t handle) { server->cancel(handle); }
void hasten_forget(Server* server, int64_t handle) { server->forget(handle); }

// Attention alone, for tests: a layer's, over tokens that come in passes up to `ends`. queries, out: (tokens, heads, width).
void hasten_attend(const hasten::Attention::Sizes* sizes, int32_t window, const hasten::Input* inputs, const int32_t* ends, int32_t passes,
                   const float* queries, const float* keys, const float* values, float* out) {
    hasten::Attention attention(*sizes);
    const int query = sizes->heads * sizes->width, kept = sizes->kv_heads * sizes->width;
    for (int first = 0, i = 0; i < passes; first = ends[i++]) {
        std::vector<hasten::Input> pass(inputs + first, inputs + ends[i]);
        for (int t = first; t < ends[i]; t++)
            for (int h = 0; h < sizes->kv_heads; h++)
                attention.remember(0, inputs[t], h, keys + t * kept + h * sizes->width, values + t * kept + h * sizes->width);
        attention.plan(pass);
        for (int me = 0; me < sizes->threads; me++) attention.attend(0, window, pass, queries + first * query, query, out + first * query, me);
    }
}
}
